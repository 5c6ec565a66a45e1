"""Which attention to use for a model: reads a config.json and prints advice for three phases of its life."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from manyheads.bench.planning.advise import advise

GEMMA = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 1024,
    "max_position_embeddings": 131072,
}


def show(config: Path, phase: str) -> None:
    """Prints the best option for each kind of layer, why others cannot run, and the time of the whole model."""
    found = advise(config, 32768, machine="H100", phase=phase)
    print(f"{phase}, {found.length} tokens, {found.machine}")
    for group in found.groups:
        best = group.best
        if best is None:
            print(f"  {group.layers} layers, {group.mask}: nothing can run")
        else:
            print(f"  {group.layers} layers, {group.mask}: {best.name}, {best.ms:.2f} ms each ({best.status})")
        for option in group.options:
            if option.reasons:
                print(f"    not {option.name}: {option.reasons[0]}")
    for total in found.totals[:1]:
        print(f"  {total.name}: {total.ms:.1f} ms of attention, {total.memory / 2**30:.1f} GiB")


def main() -> None:
    """Writes a config as a model's folder has it; give ``show`` the path of yours."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(GEMMA), encoding="utf-8")
        for phase in ("prefill", "train", "decode"):
            show(config, phase)


if __name__ == "__main__":
    main()

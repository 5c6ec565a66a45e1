"""Machines by name, by what a driver calls them, and from results files."""

from __future__ import annotations

import pytest

from manyheads.bench.planning.machines import MACHINES, called, find, here, names
from manyheads.bench.store import Results


@pytest.mark.parametrize(
    ("name", "half", "memory", "copy", "units"),
    [
        ("A100", 312, 80, 2039, 108),
        ("H100", 989, 80, 3350, 132),
        ("H200", 989, 141, 4800, 132),
        ("B200", 2250, 180, 7700, 148),
        ("MI300X", 1307, 192, 5300, 304),
    ],
)
def test_published_peaks(name, half, memory, copy, units):
    found = find(name)
    assert found.limits.matrix["bfloat16"] == found.limits.matrix["float16"] == half * 1e3
    assert (found.memory_gib, found.limits.copy, found.units) == (memory, copy, units)
    assert not found.measured and "datasheet" in found.source and "exponentials" in found.source


def test_the_exponentials_of_a_hopper_chip_are_a_match_for_its_products_at_head_width_64():
    rates = find("H100").limits
    assert 0.9 < (rates.matrix["bfloat16"] / (4 * 64)) / rates.exp_rate < 1.1


def test_every_machine_is_found_by_each_of_its_names():
    for machine in MACHINES:
        for name in (machine.name, machine.name.lower(), *machine.aliases):
            assert find(name) is machine
    assert len({machine.name for machine in MACHINES}) == len(MACHINES) == len(names()) - 3


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_drivers_call_machines_otherwise(driver, name):
    assert called(driver).name == name


def test_unknown_machines_are_nobody_and_names_close_by_are_suggested():
    assert called("Some Other GPU") is None
    with pytest.raises(ValueError, match="unknown device 'H1000': did you mean 'H100'"):
        find("H1000")


def test_the_machine_of_a_results_file_is_not_measured_again():
    limits = {"matrix": {"float32": 7.0}, "copy": 3.0, "exp_rate": 2.0, "threads": 4}
    env = {"cpu_vendor": "V", "cpu_model": "M", "threads": 4, "memory_gib": 12.5}
    found = here((), known=Results({"limits": limits, "environment": env, "started": "2026-01-02T00:00:00"}))
    assert (found.name, found.kind, found.units, found.memory_gib) == ("V M, 4 threads", "cpu", 4, 12.5)
    assert found.measured and found.source == "measured 2026-01-02, results"
    assert found.rates() == "float32 7 GFLOP/s, exp 2 G/s, memory 3 GB/s"


def test_the_gpu_of_a_results_file_takes_from_the_table_what_the_file_does_not_say():
    limits = {"matrix": {"bfloat16": 700e3}, "device": "NVIDIA H200"}
    found = here((), known=Results({"limits": limits, "environment": {"gpu_memory_gib": 139.8}}))
    assert (found.kind, found.units, found.memory_gib, found.limits.matrix["bfloat16"]) == ("gpu", 132, 139.8, 700e3)
    other = here((), known=Results({"limits": {**limits, "device": "Unheard of"}, "environment": {}}))
    assert other.memory_gib is None and other.units > 0


def test_results_without_limits_name_no_machine():
    with pytest.raises(ValueError, match="holds no machine limits"):
        here((), known=Results({}))

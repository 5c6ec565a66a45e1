"""The layer of xLSTM around the mLSTM: capped gates, a norm of every head, an output gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.engine.scan import State
from manyheads.mask import Mask
from manyheads.mechanism.linear.mlstm import mlstm, step

from .inputs import check_token, check_tokens, split_heads


class HeadNorm(nn.Module):
    """Normalises every head by itself, over its channels.

    Args:
        heads: Number of heads.
        width: Channels of a head.
        eps: Added to the variance.
        centre: Whether the mean is taken away (a layer norm) or not (an RMS norm).

    Example:
        >>> HeadNorm(2, 4)(torch.randn(1, 5, 2, 4)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, heads: int, width: int, eps: float = 1e-6, *, centre: bool = True) -> None:
        super().__init__()
        self.heads, self.width, self.eps, self.centre = heads, width, eps, centre
        self.weight = nn.Parameter(torch.ones(heads * width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``(..., H, D)`` and joins the heads.

        Args:
            x: (..., H, D).

        Returns:
            (..., H * D) in the dtype of ``x``; statistics are in float32 (float64 for float64).
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.centre:
            wide = wide - wide.mean(-1, keepdim=True)
        normed = wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return normed.flatten(-2).to(x.dtype) * self.weight

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.heads}, {self.width}, eps={self.eps}, centre={self.centre}"


class MLSTM(nn.Module):
    r"""The mLSTM layer of xLSTM 7B.

    $$y = W_y\big(\sigma(W_o x) \odot \mathrm{norm}(h)\big), \qquad h = \mathrm{mlstm}(W_q x, W_k x, W_v x, i, f)$$

    with gates $i, f = c \tanh((W_{i,f}\, x + b_{i,f}) / c)$ for every head.

    Args:
        embed_dim: Width C of the tokens.
        num_heads: Number of heads.
        qk_factor: Width of all queries, and of all keys, by that of the tokens.
        v_factor: Width of all values by that of the tokens.
        gate: ``"exp"`` or ``"sigmoid"``.
        normalise: As in :func:`manyheads.mechanism.linear.mlstm.mlstm`.
        gate_cap: Gate pre-activations stay within plus and minus this; None for no cap.
        norm_eps: Epsilon of the norm of the heads. With small input gates it decides what is passed on.
        bias: Whether the projections have biases; the gates always have.
        chunk: As in :func:`manyheads.mechanism.linear.mlstm.mlstm`.

    Raises:
        ValueError: Widths that the heads do not divide.

    Conventions:
        Forget gates start nearly open (biases 3 to 6 over the heads), input gates nearly shut (bias -10).

    Source:
        Beck et al., xLSTM 7B, arXiv 2503.13427, section 3.

    Example:
        >>> layer = MLSTM(32, 4)
        >>> x = torch.randn(2, 9, 32)
        >>> y = layer(x)
        >>> first, cache = layer.step(x[:, 0])
        >>> y.shape, torch.allclose(first, y[:, 0], atol=1e-5)
        (torch.Size([2, 9, 32]), True)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        qk_factor: float = 0.5,
        v_factor: float = 1.0,
        gate: str = "exp",
        normalise: bool | str | None = None,
        gate_cap: float | None = 15.0,
        norm_eps: float = 1e-6,
        bias: bool = False,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        qk, value = int(embed_dim * qk_factor), int(embed_dim * v_factor)
        for name, width in (("qk_factor", qk), ("v_factor", value)):
            if num_heads < 1 or width < num_heads or width % num_heads:
                raise ValueError(f"{name}: gives a width of {width}, which num_heads={num_heads} does not divide")
        if gate_cap is not None and not gate_cap > 0:
            raise ValueError(f"gate_cap: expected a positive number or None, got {gate_cap}")
        self.embed_dim, self.num_heads, self.gate_cap, self.chunk = embed_dim, num_heads, gate_cap, chunk
        self.gate, self.normalise = gate, normalise
        self.q_proj = nn.Linear(embed_dim, qk, bias=bias)
        self.k_proj = nn.Linear(embed_dim, qk, bias=bias)
        self.v_proj = nn.Linear(embed_dim, value, bias=bias)
        self.o_proj = nn.Linear(embed_dim, value, bias=bias)
        self.i_proj = nn.Linear(embed_dim, num_heads)
        self.f_proj = nn.Linear(embed_dim, num_heads)
        self.norm = HeadNorm(num_heads, value // num_heads, norm_eps)
        self.out_proj = nn.Linear(value, embed_dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws projections with deviation ``sqrt(2 / (5 C))``; gates start as described above."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=(2 / (5 * self.embed_dim)) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            nn.init.constant_(self.i_proj.bias, -10.0)
            self.f_proj.bias.copy_(torch.linspace(3.0, 6.0, self.num_heads))
            nn.init.ones_(self.norm.weight)

    def forward(
        self, x: Tensor, *, mask: Mask | str | None = None, cache: State | None = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, State]:
        """Mixes tokens.

        Args:
            x: (B, N, C).
            mask: None or causal, or packed documents.
            cache: What came before.
            return_cache: Also return what came before the next token.

        Returns:
            (B, N, C), and the cache when asked.

        Raises:
            ValueError: For another shape.
        """
        check_tokens(x, self.embed_dim)
        q, k, v = (split_heads(p(x), self.num_heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        i, f = (g.transpose(1, 2) for g in self._gates(x))
        h, cache = mlstm(
            q, k, v, input_gate=i, forget_gate=f, gate=self.gate, normalise=self.normalise, mask=mask, state=cache,
            return_state=True, chunk=self.chunk,
        )  # fmt: skip
        y = self._out(x, h.transpose(1, 2))
        assert cache is not None
        return (y, cache) if return_cache else y

    def step(self, x: Tensor, cache: State | None = None) -> tuple[Tensor, State]:
        """One token after the other.

        Args:
            x: (B, C).
            cache: What came before.

        Returns:
            (B, C) and the new cache.

        Raises:
            ValueError: For another shape.
        """
        check_token(x, self.embed_dim)
        q, k, v = (split_heads(p(x), self.num_heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        i, f = self._gates(x)
        h, cache = step(q, k, v, cache, input_gate=i, forget_gate=f, gate=self.gate, normalise=self.normalise)
        return self._out(x, h), cache

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations of the gates, ``(B, [N,] H)``, in float32 at least."""
        found = []
        for proj in (self.i_proj, self.f_proj):
            gate = proj(x)
            gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
            found.append(gate if self.gate_cap is None else self.gate_cap * torch.tanh(gate / self.gate_cap))
        return found[0], found[1]

    def _out(self, x: Tensor, h: Tensor) -> Tensor:
        return self.out_proj(torch.sigmoid(self.o_proj(x)) * self.norm(h))

"""A Transformer arranged for decoding, at the end of chapter 18.

The numbers are those of the model; what changes is how often the processor is asked. One token
passes through 30 layers, and each layer is a handful of matrices times one vector: reading the
matrices takes most of the time, and the calls in between the rest. So matrices that read the same
vector become one, in the layout that the processor reads fastest, and everything that is the same
in all layers (angles, masks) is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name that PyTorch's own pages use

from minilm.attention import (
    KeyValueStore,
    alibi_bias,
    alibi_slopes,
    attention_mask,
    fused_attention,
    rotary_angles,
)
from minilm.errors import ConfigError
from minilm.model import Block, ModelConfig, RMSNorm, Transformer

__all__ = ["Decoder", "DecoderLayer", "FastRMSNorm", "PackedLinear", "Step", "join_linears"]

LinearFactory: TypeAlias = Callable[[Tensor, Tensor | None], nn.Module]

# The parts, arranged


class PackedLinear(nn.Module):
    """A matrix (and a bias), laid out for multiplication with few rows.

    32-bit weights are kept transposed, `in out`: one row times such a matrix reads it from one end
    to the other, twice as fast as `nn.Linear` where it was measured. 16-bit weights go to FBGEMM,
    which reads float16 and multiplies in float32. It reads every bfloat16 number between 2^-17 and
    65504 exactly, and smaller ones to within 2^-25. Where neither is to be had: `F.linear`.

    Args:
        weight: `out in`, of the dtype that it is to be kept in.
        bias: `out`, or None.

    Attributes:
        nbytes: What one multiplication reads.
    """

    def __init__(self, weight: Float[Tensor, "out in"], bias: Tensor | None = None) -> None:
        super().__init__()
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self.multiply = fbgemm() if fits_fbgemm(weight) else None
        self.transposed = weight.dtype == torch.float32 and weight.device.type == "cpu"
        if self.multiply is not None:
            wide = None if bias is None else bias.float()
            self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), wide)
        else:
            self.weight = weight.T.contiguous() if self.transposed else weight
            self.bias = bias

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Multiply; the result has the dtype of `x`."""
        if self.multiply is not None:
            product: Tensor = self.multiply(x.float(), self.packed)
        elif self.transposed:
            product = x @ self.weight if self.bias is None else x @ self.weight + self.bias
        else:
            product = F.linear(x.to(self.weight.dtype), self.weight, self.bias)
        return product if product.dtype == x.dtype else product.to(x.dtype)


def fits_fbgemm(weight: Float[Tensor, "out in"]) -> bool:
    """Whether FBGEMM is there and takes the weight: 16 bits, on the CPU, no number too large."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    return fbgemm() is not None and float(weight.abs().max()) <= 65504


@cache
def fbgemm() -> Callable[[Tensor, Any], Tensor] | None:
    """FBGEMM's product of float32 rows and a packed float16 matrix; None where there is none."""
    try:
        packed = torch.ops.quantized.linear_prepack_fp16(torch.eye(2), None)
        multiply: Callable[[Tensor, Any], Tensor] = torch.ops.quantized.linear_dynamic_fp16._op
        ones = torch.ones(
            1, 2
        )  # `_op`: without the wrapper, which takes longer than a small product
        return multiply if torch.equal(multiply(ones, packed), ones) else None
    except (AttributeError, RuntimeError):  # another processor, or a PyTorch without it
        return None


def join_linears(layers: Sequence[nn.Module], linear: LinearFactory) -> nn.Module:
    """Make one layer of several that read the same vector; their outputs lie side by side.

    Args:
        layers: `nn.Linear`, or of another type with a class method `concatenate`, such as those of
            chapter 19; a single one of these is taken as it is.
        linear: Makes the layer of a weight and a bias.

    Raises:
        ConfigError: If the layers cannot be joined.
    """
    kind = type(layers[0])
    if kind is nn.Linear and all(type(layer) is nn.Linear for layer in layers):
        weight = torch.cat([layer.get_parameter("weight").detach() for layer in layers])
        biases = [layer.bias for layer in layers if isinstance(layer.bias, Tensor)]
        return linear(weight, torch.cat(biases).detach() if biases else None)
    if len(layers) == 1:
        return layers[0]
    if not hasattr(kind, "concatenate") or any(type(layer) is not kind for layer in layers):
        raise ConfigError(
            f"{', '.join(type(layer).__name__ for layer in layers)} cannot become one layer; "
            "decode with the Transformer itself, or merge what was added to its nn.Linear layers"
        )
    joined: nn.Module = kind.concatenate(layers)
    return joined


class FastRMSNorm(nn.Module):
    """`minilm.model.RMSNorm` in four operations instead of seven.

    The root of (mean square + eps) is hypot(length, root of d·eps) / root of d.

    Args:
        norm: Where gain and eps come from.
        dtype: Of what comes in: float32 or finer.
    """

    def __init__(self, norm: RMSNorm, dtype: torch.dtype) -> None:
        super().__init__()
        width = len(norm.weight)
        self.weight = nn.Parameter(norm.weight.detach().to(dtype) * width**0.5, False)
        self.least = nn.Parameter(
            torch.ones_like(self.weight[0]) * (width * norm.eps) ** 0.5, False
        )

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Normalize the last axis."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.hypot(length, self.least) * self.weight


def arrange_norm(norm: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The quickest form of a norm; the model's own is not changed."""
    if isinstance(norm, RMSNorm) and dtype in (torch.float32, torch.float64):
        return FastRMSNorm(norm, dtype)
    return deepcopy(norm).to(dtype)


# One call


class Step:
    """What all layers of one call share: where its tokens stand, and who sees whom.

    Args:
        config: Of the model.
        positions: Of the new tokens.
        dtype: Of the activations.

    Attributes:
        positions: As given.
        waves: Cosines of the angles of rotation, twice, and their sines, first negative, then
            positive; each `batch seq 1 head_dim`. None where nothing is rotated.
    """

    def __init__(
        self, config: ModelConfig, positions: Int[Tensor, "batch seq"], dtype: torch.dtype
    ) -> None:
        self.config, self.positions, self.dtype = config, positions, dtype
        self.waves: tuple[Tensor, Tensor] | None = None
        if config.positions == "rotary":
            angles = rotary_angles(positions, config.head_dim, config.rope_theta)[:, :, None]
            cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
            self.waves = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        self._made_for: tuple[Tensor | None, int | None] = (None, None)
        self._seen: tuple[Tensor | None, bool] = (None, False)

    def turn(self, x: Float[Tensor, "batch seq heads e"]) -> Float[Tensor, "batch seq heads e"]:
        """`minilm.attention.rotate` for all heads at once, in three operations."""
        if self.waves is None:
            return x
        cos, sin = self.waves
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)

    def visibility(
        self, there: Int[Tensor, "batch keys"], window: int | None
    ) -> tuple[Float[Tensor, "batch heads seq keys"] | None, bool]:
        """What to add to the scores (None: nothing), and whether query i just sees keys 0 to i.

        Made anew only where a layer's keys or its window are others than the last layer's.
        """
        if self._made_for[0] is there and self._made_for[1] == window:
            return self._seen
        self._made_for, alibi = (there, window), self.config.positions == "alibi"
        mask = attention_mask(self.positions, there, window=window)
        square = mask.shape[2] == mask.shape[3]
        if not alibi and mask.all():
            self._seen = None, False
        elif not alibi and square and torch.equal(mask, torch.ones_like(mask).tril()):
            self._seen = None, True
        else:
            bias = torch.zeros(1, dtype=self.dtype, device=there.device)
            if alibi:
                slopes = alibi_slopes(self.config.n_heads).to(there.device)
                bias = alibi_bias(slopes, self.positions, there).to(self.dtype)
            self._seen = bias.masked_fill(~mask, torch.finfo(self.dtype).min), False
        return self._seen


class DecoderLayer(nn.Module):
    """A `minilm.model.Block` with its matrices joined: four instead of six or seven.

    Args:
        block: Where weights and habits come from.
        config: Of the model.
        dtype: Of the activations.
        linear: Makes a layer of a weight and a bias.
    """

    def __init__(
        self, block: Block, config: ModelConfig, dtype: torch.dtype, linear: LinearFactory
    ) -> None:
        super().__init__()
        attn, mlp = block.self_attn, block.mlp
        self.n_heads, self.n_kv, self.head_dim = attn.n_heads, attn.n_kv_heads, attn.head_dim
        self.window, self.activation = attn.window, mlp.activation
        self.attn_norm = arrange_norm(block.attn_norm, dtype)
        self.mlp_norm = arrange_norm(block.mlp_norm, dtype)
        self.q_norm, self.k_norm = (
            arrange_norm(attn.q_norm, dtype),
            arrange_norm(attn.k_norm, dtype),
        )
        self.qkv = join_linears([attn.q_proj, attn.k_proj, attn.v_proj], linear)
        self.o = join_linears([attn.o_proj], linear)
        gate = [] if mlp.gate_proj is None else [mlp.gate_proj]
        self.up = join_linears([*gate, mlp.up_proj], linear)
        self.down = join_linears([mlp.down_proj], linear)
        self.qk_norm = config.qk_norm

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], step: Step, kv: KeyValueStore | None
    ) -> Float[Tensor, "batch seq d_model"]:
        """Return the stream with two additions."""
        x = x + self.o(self.attend(self.qkv(self.attn_norm(x)), step, kv))
        inner = self.up(self.mlp_norm(x))
        if self.activation == "swiglu":
            gate, inner = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * inner
        elif self.activation == "gelu":
            inner = F.gelu(inner, approximate="tanh")
        else:
            inner = F.relu(inner).square()
        added: Tensor = x + self.down(inner)
        return added

    def attend(
        self, qkv: Float[Tensor, "batch seq width"], step: Step, kv: KeyValueStore | None
    ) -> Float[Tensor, "batch seq d_attn"]:
        """From joined queries, keys and values to what attention gathers."""
        heads = qkv.view(*qkv.shape[:2], -1, self.head_dim)
        n_qk = self.n_heads + self.n_kv
        qk, v = heads[:, :, :n_qk], heads[:, :, n_qk:].transpose(1, 2)
        if self.qk_norm:
            q, k = qk[:, :, : self.n_heads], qk[:, :, self.n_heads :]
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        qk = step.turn(qk).transpose(1, 2)
        q, k = qk[:, : self.n_heads], qk[:, self.n_heads :]
        there: Tensor | None = step.positions
        if kv is not None:
            k, v, there = kv.extend(k, v, step.positions)
        bias, causal = (None, False) if there is None else step.visibility(there, self.window)
        if q.shape[2] > 1:
            out = fused_attention(q, k, v, bias=bias, causal=causal)
            return out.transpose(1, 2).flatten(2)
        return attend_one(q, k, v, bias).flatten(1)[:, None]


def attend_one(
    q: Float[Tensor, "batch heads 1 e"],
    k: Float[Tensor, "batch kv_heads keys e"],
    v: Float[Tensor, "batch kv_heads keys e"],
    bias: Float[Tensor, "batch #heads 1 keys"] | None,
) -> Float[Tensor, "batch heads e"]:
    """Attention of one query in each row: two products and a softmax, and no key is copied."""
    batch, n_heads, _, e = q.shape
    n_kv = k.shape[1]
    grouped = q.reshape(batch * n_kv, n_heads // n_kv, e)
    if bias is None:
        added = q.new_zeros(1, 1, 1)
    else:
        added = bias.expand(-1, n_heads, -1, -1).reshape(batch * n_kv, n_heads // n_kv, -1)
    scores = torch.baddbmm(added, grouped, k.flatten(0, 1).mT, alpha=e**-0.5)
    return torch.bmm(scores.softmax(dim=-1), v.flatten(0, 1)).reshape(batch, n_heads, e)


class Decoder(Transformer):
    """A `Transformer` with the same weights, arranged for decoding on a CPU. It cannot be trained.

    Everything that reads a model takes it: `minilm.generation`, `minilm.measure.score`. The model
    that it was made of may be thrown away.

    Args:
        model: Where the weights come from. Its projections may be quantized (chapter 19).
        dtype: Of the matrices; default: the model's. On a CPU, activations and the cache are
            float32 in any case: processors without 16-bit arithmetic are quickest so.
        linear: Makes each layer of a weight (`out in`) and a bias or None; default: `PackedLinear`.
            Called with the joined matrices, and last with that of the logits.

    Attributes:
        weight_bytes: What one token reads: all matrices once, and the head.

    Raises:
        ConfigError: If layers cannot be joined, as with LoRA beside them.

    Example:
        >>> from minilm.model import llama_config
        >>> model = Transformer(llama_config(257, 64, d_model=32, n_layers=2, n_heads=4)).eval()
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> torch.allclose(Decoder(model)(ids), model(ids), atol=1e-5)
        True
    """

    def __init__(
        self,
        model: Transformer,
        dtype: torch.dtype | None = None,
        linear: LinearFactory | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not Transformer's: that would draw weights
        gain = next(model.norm.parameters())
        dtype = gain.dtype if dtype is None else dtype
        if not dtype.is_floating_point:
            raise ConfigError(f"dtype={dtype}; use a float type, such as torch.bfloat16")
        on_cpu = gain.device.type == "cpu"
        stream = torch.promote_types(dtype, torch.float32) if on_cpu else dtype
        make = PackedLinear if linear is None else linear

        def narrow(weight: Tensor, bias: Tensor | None) -> nn.Module:
            return make(weight.to(dtype), None if bias is None else bias.to(dtype))

        self.config, self.max_seq_len = model.config, model.max_seq_len
        if hasattr(model, "tokenizer"):
            self.tokenizer = model.tokenizer
        self.embed_tokens = model.embed_tokens
        if isinstance(model.embed_tokens, nn.Embedding):
            table = model.embed_tokens.weight.detach()
            self.embed_tokens = nn.Embedding(len(table), table.shape[1], _weight=table.to(dtype))
        self.embed_positions = None
        if model.embed_positions is not None:
            self.embed_positions = deepcopy(model.embed_positions).to(stream)
        blocks = [block for block in model.layers if isinstance(block, Block)]
        layers = [DecoderLayer(block, self.config, stream, narrow) for block in blocks]
        self.layers, self.norm = nn.ModuleList(layers), arrange_norm(model.norm, stream)
        if model.lm_head is None:
            self.head = narrow(model.embed_tokens.weight.detach(), None)
        else:
            self.head = join_linears([model.lm_head], narrow)
        matrices = [m for layer in layers for m in (layer.qkv, layer.o, layer.up, layer.down)]
        self.weight_bytes = sum(map(bytes_of, [*matrices, self.head]))
        self.requires_grad_(False).eval()

    def states(
        self,
        input_ids: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "#batch seq"] | None = None,
        kv: Sequence[KeyValueStore] | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Return the stream after the last norm; arguments as in `Transformer.forward`."""
        if kv is not None and (len(kv) != len(self.layers) or positions is None):
            raise ConfigError(
                f"kv has {len(kv)} stores for {len(self.layers)} layers, with positions "
                f"{positions is not None}; wanted one store for each layer, and positions"
            )
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        positions = positions.expand(input_ids.shape)
        x = self.embed_tokens(input_ids).to(next(self.norm.parameters()).dtype)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        step = Step(self.config, positions, x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, step, None if kv is None else kv[i])
        normed: Tensor = self.norm(x)
        return normed

    def logits(self, states: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Compare each state with the vector of every id."""
        scores: Tensor = self.head(states)
        return scores


def bytes_of(layer: nn.Module) -> int:
    """What one multiplication reads: the layer's `nbytes`, or its parameters and buffers."""
    tensors = [*layer.parameters(), *layer.buffers()]
    return int(getattr(layer, "nbytes", sum(tensor.nbytes for tensor in tensors)))

"""
GPTQ as a number format: what a file stores for one layer, and the way to canonical form and back (SPEC.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from quantplug.errors import CheckpointError, ConfigError, ConvertError
from quantplug.jsonio import get_str
from quantplug.scheme import LinearScheme
from quantplug.spec import ElementType, Granularity, LinearShape, ParamSpec, PerChannel, PerGroup, WeightSpec
from quantplug.stored import check_stored
from quantplug_gptq.fields import BITS, V1, V2, checkpoint_format, read_storage

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from quantplug.jsonio import Json
    from quantplug.weight import ActivationParams, Weight

_KEYS = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "zeros_offset")


@dataclass(frozen=True, slots=True)
class GPTQScheme(LinearScheme):
    """
    One set of GPTQ parameters.

    Attributes:
        bits: width of one code: 2, 3, 4 or 8.
        group_size: inputs that share a scale; -1 for all of them.
        sym: whether every zero point is the middle one, so that codes can be signed and need none.
        desc_act: whether `g_idx` may assign inputs to groups in any order.
        checkpoint_format: "gptq" stores zero points less one, "gptq_v2" as they are.
        zeros_offset: how "gptq" took that one away: "field" by field, modulo 2^bits, or from whole "word"s, where a
            zero point of 0 borrows from the next one (GPTQModel, for 2, 4 and 8 bits).
    """

    name: ClassVar[str] = "gptq"
    suffixes: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    bits: int
    group_size: int
    sym: bool = True
    desc_act: bool = False
    checkpoint_format: str = V1
    zeros_offset: str = "field"

    @property
    def required_suffixes(self) -> frozenset[str]:
        """All but `g_idx`, which files without act-order may lack."""
        return frozenset({"qweight", "qzeros", "scales"})

    @classmethod
    def build(cls, params: Mapping[str, Json], where: str) -> Self:
        """
        Read the parameters; bits and group_size are required, the rest default to symmetric, v1, without act-order.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-CFG-REFUSED`.
        """
        unknown = sorted(params.keys() - set(_KEYS))
        if unknown:
            raise ConfigError(
                "QP-CFG-UNKNOWN", f"{where}: {unknown[0]}", "is no parameter of gptq", expected=" or ".join(_KEYS)
            )
        storage = read_storage(params, lambda key: f"{where}: {key}")
        v1 = checkpoint_format(params, "checkpoint_format", f"{where}: checkpoint_format") == V1
        offset = get_str(params, "zeros_offset", f"{where}: zeros_offset", default="field", choices=("field", "word"))
        return cls(
            bits=storage.bits,
            group_size=storage.group_size,
            sym=storage.sym,
            desc_act=storage.desc_act,
            checkpoint_format=V1 if v1 else V2,
            zeros_offset="word" if offset == "word" and v1 and storage.bits != 3 else "field",
        )

    def describe(self) -> str:
        """Return "gptq 4-bit group 64 sym", for instance."""
        group = "per channel" if self.group_size == -1 else f"group {self.group_size}"
        order = " act-order" if self._reorders else ""
        version = " v2" if self.checkpoint_format == V2 else ""
        return f"gptq {self.bits}-bit {group} {'sym' if self.sym else 'asym'}{order}{version}"

    @property
    def scale_suffixes(self) -> frozenset[str]:
        """Scales keep the dtype of the file."""
        return frozenset({"scales"})

    def weight_spec(self) -> WeightSpec:
        """Return signed codes without zero points for symmetric files, unsigned codes with them otherwise."""
        granularity: Granularity = PerChannel() if self.group_size == -1 else PerGroup(self.group_size)
        return WeightSpec(ElementType.integer(self.bits, signed=self.sym), granularity, "float16", self._reorders)

    def params(self, shape: LinearShape) -> tuple[ParamSpec, ...]:
        """Declare the four tensors; without act-order a file may lack `g_idx`, and then K fills `qweight` exactly."""
        n, k = shape.out_features, shape.in_features
        groups, packed = self._groups(k), (32, self.bits)
        return (
            ParamSpec("qweight", (self._words(k), n), ("int32",), True, 0, packed, output_axis=1, input_axis=0),
            ParamSpec("qzeros", (groups, self._words(n)), ("int32",), True, 1, packed, output_axis=1, input_axis=0),
            ParamSpec("scales", (groups, n), ("float16", "bfloat16", "float32"), output_axis=1, input_axis=0),
            ParamSpec("g_idx", (k,), ("int32",), self._reorders, input_axis=0),
        )

    def written(self, shape: LinearShape) -> tuple[ParamSpec, ...]:
        """Declare all four tensors: engines expect a `g_idx`, the trivial one, too."""
        return self.params(shape)

    def shape_of(self, stored: Mapping[str, tuple[int, ...]], where: str) -> LinearShape:
        """
        Return N from `qweight` and K from `g_idx`, or from `qweight` where there is none.

        Raises:
            CheckpointError: `QP-ST-MISSING`, or `QP-ST-SHAPE` with the parameters that the shapes would fit.
        """
        for suffix in sorted(self.required_suffixes - stored.keys()):
            raise CheckpointError(
                "QP-ST-MISSING", f"{where}.{suffix}", "is not there", expected=f"every tensor of {self.describe()}"
            )
        ranks = {"qweight": 2, "qzeros": 2, "scales": 2, "g_idx": 1}
        for suffix, size in stored.items():
            if len(size) != ranks[suffix]:
                raise CheckpointError(
                    "QP-ST-SHAPE", f"{where}.{suffix}", f"shape {list(size)}", expected=f"{ranks[suffix]} dimensions"
                )
        rows, n = stored["qweight"]
        shape = LinearShape(n, stored["g_idx"][0] if "g_idx" in stored else rows * 32 // self.bits)
        for spec in self.params(shape):
            if spec.suffix in stored and stored[spec.suffix] != spec.shape:
                raise CheckpointError(
                    "QP-ST-SHAPE",
                    f"{where}.{spec.suffix}",
                    f"shape {list(stored[spec.suffix])}",
                    expected=f"{list(spec.shape)} for {self.describe()} and {shape.in_features} inputs",
                    fix=_fitting(stored),
                )
        return shape

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: LinearShape, where: str) -> Weight:
        """
        Turn stored tensors into canonical form; codes are the transposed view of a `[K, N]` buffer.

        Raises:
            CheckpointError: `QP-ST-MISSING`, `QP-ST-DTYPE`, `QP-ST-SHAPE`, `QP-ST-SCALE`, `QP-ST-ZEROS`, `QP-ST-GIDX`,
                `QP-ST-PADDING`.
        """
        import torch

        from quantplug.weight import Weight
        from quantplug_gptq import checks
        from quantplug_gptq.layout import unpack_rows

        check_stored(self.params(shape), tensors, where)
        checks.check_scales(tensors["scales"], where)
        k, groups = shape.in_features, self._groups(shape.in_features)
        g_idx = checks.group_index(tensors.get("g_idx"), k, self._size(k), groups, desc_act=self.desc_act, where=where)
        zeros = None if self.sym else self._decode_zeros(tensors["qzeros"], shape.out_features, where)
        if self.sym and not self._stores_the_middle(tensors["qzeros"], shape.out_features):
            found = self._decode_zeros(tensors["qzeros"], shape.out_features, where)
            checks.check_symmetric(found, self.bits, v2=self.checkpoint_format == V2, where=where)
        middle = 1 << (self.bits - 1) if self.sym else 0
        fields = unpack_rows(tensors["qweight"], self.bits, subtract=middle)
        if fields.shape[0] > k:
            checks.check_unused(fields[k:] + middle, k, f"{where}.qweight")
        codes = fields[:k].t()
        return Weight(
            codes=codes.view(torch.int8) if self.sym else codes,
            scales=tensors["scales"].t(),
            spec=replace(self.weight_spec(), scale_dtype=str(tensors["scales"].dtype).removeprefix("torch.")),
            zeros=zeros,
            g_idx=g_idx,
        )

    def encode(self, weight: Weight, activation: ActivationParams | None = None) -> dict[str, torch.Tensor]:
        """
        Turn canonical form into the four stored tensors; a trivial `g_idx` is written out.

        Raises:
            ConvertError: `QP-CONV-SPEC` when the weight does not obey this scheme's contract.
        """
        import torch

        from quantplug_gptq.layout import pack_rows

        self._check_contract(weight)
        n, k = weight.codes.shape
        middle = 1 << (self.bits - 1)
        # Adding in uint8 is modulo 256, which turns two's complement into the unsigned code.
        codes = weight.codes.t().view(torch.uint8) + middle if self.sym else weight.codes.t()
        zeros = weight.zeros
        if zeros is None:
            zeros = torch.full((n, self._groups(k)), middle, dtype=torch.uint8)
        for values, name in ((codes, "code"), (zeros, "zero point")):
            if values.numel() and int(values.max()) >> self.bits:
                raise self._broken(f"the {name} {int(values.max())}", f"{self.bits} bits")
        g_idx = weight.g_idx
        if g_idx is None:
            g_idx = torch.arange(k, dtype=torch.int32) // self._size(k)
        return {
            "qweight": pack_rows(codes, self.bits),
            "qzeros": self._encode_zeros(zeros),
            "scales": weight.scales.t().contiguous(),
            "g_idx": g_idx.to(torch.int32).contiguous(),
        }

    def quantize(self, dense: torch.Tensor, *, hessian: torch.Tensor | None = None) -> Weight:
        """
        Choose codes, scales and zero points: by GPTQ where a Hessian is given, else to nearest with searched scales.

        Scales are float16 with eight significant bits, which bfloat16 holds, too. Zero points of version 1 files are at
        least 1, so that all readers agree about them.

        Raises:
            ConvertError: `QP-CONV-SPEC` when the Hessian is not `[K, K]`.
        """
        import torch

        from quantplug.weight import Weight
        from quantplug_gptq.rounding import Grid, round_to_nearest
        from quantplug_gptq.solver import solve

        k = dense.shape[1]
        grid = Grid(self.bits, self.group_size, self.sym, 1 if self.checkpoint_format == V1 else 0)
        if hessian is None:
            rounded = round_to_nearest(dense, grid)
        elif tuple(hessian.shape) != (k, k):
            raise self._broken(f"a weight of {k} inputs by a Hessian {list(hessian.shape)}", f"{[k, k]}")
        else:
            rounded = solve(dense, hessian, grid, reorder=self._reorders)
        trivial = torch.equal(rounded.g_idx, torch.arange(k) // self._size(k))
        codes = rounded.codes
        return Weight(
            codes=codes.sub_(1 << (self.bits - 1)).view(torch.int8) if self.sym else codes,
            scales=rounded.scales.to(torch.float16),
            spec=self.weight_spec(),
            zeros=None if self.sym else rounded.zeros,
            g_idx=None if trivial else rounded.g_idx.to(torch.int32),
        )

    @property
    def _reorders(self) -> bool:
        return self.desc_act and self.group_size != -1

    def _words(self, codes: int) -> int:
        return -(-codes * self.bits // 32)

    def _size(self, inputs: int) -> int:
        """Return the inputs of one group, never 0."""
        return max(1, inputs) if self.group_size == -1 else self.group_size

    def _groups(self, inputs: int) -> int:
        return 1 if self.group_size == -1 else -(-inputs // self.group_size)

    def _decode_zeros(self, qzeros: torch.Tensor, rows: int, where: str) -> torch.Tensor:
        """Return zero points uint8 `[N, G]` from `[G, words]`."""
        from quantplug_gptq.checks import check_unused
        from quantplug_gptq.layout import one_per_field, unpack_rows

        words = qzeros.t().contiguous()
        if self.zeros_offset == "word":
            words = words + one_per_field(self.bits)  # int32 wraps, and a field's carry undoes what it had borrowed
        fields = unpack_rows(words, self.bits)
        if fields.shape[0] > rows:
            check_unused(fields[rows:], rows, f"{where}.qzeros")
        zeros = fields[:rows]
        if self.checkpoint_format == V1 and self.zeros_offset == "field":
            zeros = zeros.add_(1).bitwise_and_((1 << self.bits) - 1)
        return zeros

    def _stores_the_middle(self, qzeros: torch.Tensor, rows: int) -> bool:
        """Whether every word is that of middle zero points, as in nearly all symmetric files; False is no verdict."""
        from quantplug_gptq.layout import constant_words

        if rows % 32:
            return False
        expected = constant_words((1 << (self.bits - 1)) - (self.checkpoint_format == V1), self.bits)
        return bool((qzeros.reshape(-1, self.bits) == expected).all())

    def _encode_zeros(self, zeros: torch.Tensor) -> torch.Tensor:
        """Return `[G, words]` from zero points uint8 `[N, G]`."""
        from quantplug_gptq.layout import one_per_field, pack_rows

        if self.checkpoint_format == V1 and self.zeros_offset == "field":
            zeros = (zeros - 1) & ((1 << self.bits) - 1)
        words = pack_rows(zeros, self.bits)
        if self.zeros_offset == "word":
            words = words - one_per_field(self.bits)
        return words.t().contiguous()

    def _check_contract(self, weight: Weight) -> None:
        spec = weight.spec
        want = replace(self.weight_spec(), scale_dtype=spec.scale_dtype)
        if spec != want:
            raise self._broken(f"a weight of {spec.describe()}", want.describe())
        n, k = weight.codes.shape
        if tuple(weight.scales.shape) != (n, self._groups(k)):
            raise self._broken(f"scales {list(weight.scales.shape)}", f"{[n, self._groups(k)]}")

    def _broken(self, what: str, expected: str) -> ConvertError:
        return ConvertError("QP-CONV-SPEC", self.describe(), f"cannot store {what}", expected=expected)


def _fitting(stored: Mapping[str, tuple[int, ...]]) -> str:
    """Say which parameters the shapes of a layer would fit, for an error that refuses those of the configuration."""
    rows, n = stored["qweight"]
    groups, zero_words = stored["qzeros"]
    for bits in BITS:
        k = stored["g_idx"][0] if "g_idx" in stored else rows * 32 // bits
        if -(-n * bits // 32) == zero_words and -(-k * bits // 32) == rows and groups:
            size = "-1" if groups == 1 else str(-(-k // groups))
            return f"The shapes fit bits {bits} and group_size {size}; correct the configuration if it is wrong."
    return "The shapes fit no GPTQ layer; the file is damaged or of another format."

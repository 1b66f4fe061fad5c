"""Arithmetic and elementary functions on LLVM vectors: what the machine code of `lanes` is made of.

A `Vectors` writes instructions for values of type <W x T>, T a float, an integer or a bit: W instances
side by side. Multiplications and additions may fuse (as in XLA), nothing else is rearranged, and NaN passes
through everything. exp, expm1, log, log1p and tanh are within 2 units of rounding, artanh within 2.5.
"""

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import partial, reduce
from typing import Any, NamedTuple

import llvmlite
import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from alignpro.theory import compiled

BIT, BYTE = ir.IntType(1), ir.IntType(8)
_TYPES: dict[str, Any] = {
    "float64": ir.DoubleType(),
    "float32": ir.FloatType(),
    "int64": ir.IntType(64),
    "int32": ir.IntType(32),
    "bool": BIT,
}
_FUSE = ("contract",)
_LOG2 = Fraction("0.69314718055994530941723212145817656807550013436025525412068000949")


class _Format(NamedTuple):
    """A floating-point format, and how far the series must go for it."""

    bits: int
    info: Any
    exp_ends: tuple[float, float]
    """Arguments below and above which eˣ is 0 and ∞."""
    log2_bits: int
    """Bits of log 2 whose product with any exponent is exact."""
    exp_terms: int
    expm1_terms: int
    log_terms: int


_DOUBLE = _Format(64, np.finfo(np.float64), (-746.0, 710.0), 32, 13, 15, 10)
_SINGLE = _Format(32, np.finfo(np.float32), (-104.0, 89.0), 15, 7, 9, 4)


def _format(x: Any) -> _Format:
    return _DOUBLE if isinstance(x.type.element, ir.DoubleType) else _SINGLE


def element(dtype: Any) -> Any:
    """The LLVM type of one number; NotImplementedError where there is none."""
    name = np.dtype(dtype).name
    if name not in _TYPES:
        raise NotImplementedError(f"numbers of type {name} have no vectors here")
    return _TYPES[name]


def _is_float(x: Any) -> bool:
    return not isinstance(x.type.element, ir.IntType)


class Vectors:
    """Writes the instructions for `width` lanes at the place of `builder`."""

    def __init__(self, builder: ir.IRBuilder, width: int):
        self.builder, self.width = builder, width
        # fmt: off
        compare, shift = self.compare, self._shift
        self.operations: dict[str, Callable[..., Any]] = {
            "abs": self.abs, "add": self.add, "add_any": self.add, "and": builder.and_,
            "atanh": self._atanh, "div": self._div, "eq": partial(compare, "=="), "exp": self.exp,
            "expm1": self.expm1, "ge": partial(compare, ">="), "gt": partial(compare, ">"),
            "le": partial(compare, "<="), "log": self.log, "log1p": self.log1p, "lt": partial(compare, "<"),
            "max": partial(self._extreme, "maximum", ">"), "min": partial(self._extreme, "minimum", "<"),
            "mul": self.mul, "ne": partial(compare, "!="), "neg": self._neg, "not": builder.not_,
            "or": builder.or_, "rsqrt": self._rsqrt, "select_n": self._select,
            "shift_left": partial(shift, builder.shl), "shift_right_arithmetic": partial(shift, builder.ashr),
            "shift_right_logical": partial(shift, builder.lshr), "sqrt": partial(self._intrinsic, "sqrt"),
            "square": lambda x: self.mul(x, x), "sub": self.sub, "tanh": self._tanh, "xor": builder.xor,
        }
        # fmt: on

    def vector(self, of: Any) -> Any:
        """The type <width x of>."""
        return ir.VectorType(of, self.width)

    def constant(self, value: Any, like: Any) -> Any:
        """The value in every lane, of an element type or of the type of a vector."""
        of = like if not hasattr(like, "type") else like.type.element
        number: Any = int(value) if isinstance(of, ir.IntType) else float(value)
        if isinstance(of, ir.FloatType):
            number = float(np.float32(number))
        return ir.Constant(self.vector(of), [ir.Constant(of, number)] * self.width)

    def everywhere(self, number: Any) -> Any:
        """Repeat one number in every lane."""
        b, zero = self.builder, ir.Constant(ir.IntType(32), 0)
        alone = b.insert_element(ir.Constant(self.vector(number.type), ir.Undefined), number, zero)
        return b.shuffle_vector(
            alone, alone, ir.Constant(ir.VectorType(zero.type, self.width), [0] * self.width)
        )

    def flushed(self, x: Any) -> Any:
        """0 where a float is below the smallest normal one."""
        if not _is_float(x):
            return x
        tiny = self.compare("<", self.abs(x), _format(x).info.tiny)
        return self.builder.select(tiny, self.constant(0, x), x)

    def add(self, x: Any, y: Any) -> Any:
        return self.builder.fadd(x, y, flags=_FUSE) if _is_float(x) else self.builder.add(x, y)

    def sub(self, x: Any, y: Any) -> Any:
        return self.builder.fsub(x, y, flags=_FUSE) if _is_float(x) else self.builder.sub(x, y)

    def mul(self, x: Any, y: Any) -> Any:
        return self.builder.fmul(x, y, flags=_FUSE) if _is_float(x) else self.builder.mul(x, y)

    def _div(self, x: Any, y: Any) -> Any:
        if not _is_float(x):  # JAX defines division by 0, LLVM does not
            raise NotImplementedError("div of integers has no rule for batches in lanes")
        return self.builder.fdiv(x, y)

    def _neg(self, x: Any) -> Any:
        return self.builder.fneg(x) if _is_float(x) else self.builder.neg(x)

    def abs(self, x: Any) -> Any:
        if _is_float(x):
            return self._intrinsic("fabs", x)
        return self.builder.select(self.compare("<", x, 0), self.builder.neg(x), x)

    def _rsqrt(self, x: Any) -> Any:
        return self.builder.fdiv(self.constant(1, x), self._intrinsic("sqrt", x))

    def power(self, x: Any, exponent: int) -> Any:
        """x to a whole positive power."""
        if exponent < 1:
            raise NotImplementedError(f"integer_pow to {exponent} has no rule for batches in lanes")
        return reduce(self.mul, [x] * exponent)

    def compare(self, sign: str, x: Any, y: Any) -> Any:
        """Bits; y may be a number. NaN is unequal to everything."""
        y = y if hasattr(y, "type") else self.constant(y, x)
        if not _is_float(x):
            return self.builder.icmp_signed(sign, x, y)
        return (self.builder.fcmp_unordered if sign == "!=" else self.builder.fcmp_ordered)(sign, x, y)

    def _shift(self, operation: Callable[[Any, Any], Any], x: Any, y: Any) -> Any:
        # By more than there are bits: JAX's value is not LLVM's.
        if not (isinstance(y, ir.Constant) and 0 <= y.constant[0].constant < x.type.element.width):
            raise NotImplementedError("shifts by a variable have no rule for batches in lanes")
        return operation(x, y)

    def _extreme(self, intrinsic: str, sign: str, x: Any, y: Any) -> Any:
        if _is_float(x):
            return self._intrinsic(intrinsic, x, y)
        return self.builder.select(self.compare(sign, x, y), x, y)

    def _select(self, which: Any, *cases: Any) -> Any:
        """`lax.select_n` of two cases: the second where `which` is true."""
        if len(cases) != 2 or which.type.element != BIT:
            raise NotImplementedError("select_n by an integer has no rule for batches in lanes")
        return self.builder.select(which, cases[1], cases[0])

    def convert(self, x: Any, old: Any, new: Any) -> Any:
        """Convert from one dtype to another."""
        b, to = self.builder, self.vector(element(new))
        old, new = np.dtype(old), np.dtype(new)
        if old == new:
            return x
        if new.kind == "b":
            return self.compare("!=", x, 0)
        if old.kind == "b":
            return b.uitofp(x, to) if new.kind == "f" else b.zext(x, to)
        longer = new.itemsize > old.itemsize
        if old.kind == new.kind == "f":
            return b.fpext(x, to) if longer else b.fptrunc(x, to)
        if old.kind == "f":  # out of range: JAX's value is not LLVM's
            raise NotImplementedError("float to integer has no rule for batches in lanes")
        if new.kind == "f":
            return b.sitofp(x, to)
        return b.sext(x, to) if longer else b.trunc(x, to)

    def bits_as(self, x: Any, new: Any) -> Any:
        """Reinterpret the bits as another dtype of the same size."""
        return self.builder.bitcast(x, self.vector(element(new)))

    def _intrinsic(self, name: str, *args: Any) -> Any:
        of = args[0].type
        full = f"llvm.{name}.v{self.width}f{_format(args[0]).bits}"
        module = self.builder.module
        known = module.globals.get(full)
        function = known or ir.Function(module, ir.FunctionType(of, [of] * len(args)), full)
        # No function here tells −0 from 0, and an extreme that need not is half as long.
        return self.builder.call(function, args, fastmath=("nsz",))

    def _polynomial(self, x: Any, *coefficients: Fraction) -> Any:
        """The highest power first."""
        terms = [self.constant(c, x) for c in coefficients]
        return reduce(lambda value, c: self.add(self.mul(value, x), c), terms)

    def _exp_series(self, x: Any, last: int) -> Any:
        """(eˣ − 1 − x)/x² up to the power `last` of x in eˣ."""
        return self._polynomial(x, *(Fraction(1, math.factorial(k)) for k in range(last, 1, -1)))

    def _times_log2(self, n: Any) -> tuple[Any, Any]:
        """n log 2 of a whole number n, in two parts; the first is exact."""
        bits = _format(n).log2_bits
        high = Fraction(math.floor(_LOG2 * 2**bits), 2**bits)
        return self.mul(n, self.constant(high, n)), self.mul(n, self.constant(_LOG2 - high, n))

    def _integers(self, x: Any) -> Any:
        """The bits of floats as integers."""
        return self.builder.bitcast(x, self.vector(ir.IntType(_format(x).bits)))

    def _power_of_two(self, n: Any, like: Any) -> Any:
        b, info = self.builder, _format(like).info
        biased = b.add(n, self.constant(1 - info.minexp, n))
        return b.bitcast(b.shl(biased, self.constant(info.nmant, n)), like.type)

    def exp(self, x: Any) -> Any:
        """eˣ = 2ⁿ eʳ, |r| ≤ ½ log 2, eʳ by its series."""
        b, form = self.builder, _format(x)
        for sign, end in zip("<>", form.exp_ends, strict=True):  # written so that NaN stays
            x = b.select(self.compare(sign, x, end), self.constant(end, x), x)
        # Adding 1.5 · 2^52 rounds to a whole number, which the low bits of the sum then hold.
        magic = self.constant(1.5 * 2.0**form.info.nmant, x)
        shifted = self.add(self.mul(x, self.constant(1 / _LOG2, x)), magic)
        most, little = self._times_log2(b.fsub(shifted, magic))
        r = self.sub(self.sub(x, most), little)
        series = self.mul(self.mul(self._exp_series(r, form.exp_terms), r), r)
        value = b.fadd(b.fadd(series, r), self.constant(1, r))
        n = b.sub(self._integers(shifted), self._integers(magic))
        # 2ⁿ in two steps: n may be beyond the exponents of normal numbers.
        half = b.ashr(n, self.constant(1, n))
        return b.fmul(b.fmul(value, self._power_of_two(half, x)), self._power_of_two(b.sub(n, half), x))

    def log(self, x: Any) -> Any:
        """log x = e log 2 + log m, √½ ≤ m < √2, log m = 2 artanh((m − 1)/(m + 1)) by its series."""
        b, form = self.builder, _format(x)
        tiny, raised = self.compare("<", x, form.info.tiny), form.info.nmant + 2
        bits = self._integers(b.select(tiny, b.fmul(x, self.constant(2.0**raised, x)), x))
        places = self.constant(form.info.nmant, bits)
        e = b.ashr(b.sub(bits, self._integers(self.constant(math.sqrt(0.5), x))), places)
        m = b.bitcast(b.sub(bits, b.shl(e, places)), x.type)
        e = b.sub(e, b.select(tiny, self.constant(raised, e), self.constant(0, e)))
        most, little = self._times_log2(b.sitofp(e, x.type))
        one = self.constant(1, x)
        s = b.fdiv(b.fsub(m, one), b.fadd(m, one))
        square, twice = b.fmul(s, s), b.fadd(s, s)
        series = self._polynomial(square, *(Fraction(1, 2 * k + 1) for k in range(form.log_terms, 0, -1)))
        small = self.add(self.mul(b.fmul(twice, square), series), little)
        value = self.add(most, b.fadd(twice, small))
        value = b.select(self.compare("==", x, math.inf), x, value)
        value = b.select(self.compare("==", x, 0), self.constant(-math.inf, x), value)
        return b.select(b.fcmp_unordered("<", x, self.constant(0, x)), self.constant(math.nan, x), value)

    def expm1(self, x: Any) -> Any:
        """eˣ − 1, by its series where |x| < ½."""
        near = self.mul(self.mul(self._exp_series(x, _format(x).expm1_terms), x), x)
        far = self.builder.fsub(self.exp(x), self.constant(1, x))
        return self.builder.select(self.compare("<", self.abs(x), 0.5), self.builder.fadd(near, x), far)

    def log1p(self, x: Any) -> Any:
        """log(1 + x), what the sum loses added back in proportion."""
        b, one = self.builder, self.constant(1, x)
        total = b.fadd(one, x)
        lost = b.fdiv(b.fsub(x, b.fsub(total, one)), total)
        value = self.log(total)
        # At 0 and at ∞ what is lost is not defined.
        return b.select(self.compare("<", self.abs(value), math.inf), b.fadd(value, lost), value)

    def _odd(self, x: Any, of_positive: Callable[[Any], Any]) -> Any:
        value = of_positive(self.abs(x))
        return self.builder.select(self.compare("<", x, 0), self.builder.fneg(value), value)

    def _tanh(self, x: Any) -> Any:
        """tanh |x| = −t/(2 + t), t = e^(−2|x|) − 1."""

        def positive(a: Any) -> Any:
            t = self.expm1(self.builder.fmul(self.constant(-2, x), a))
            return self.builder.fdiv(self.builder.fneg(t), self.builder.fadd(self.constant(2, x), t))

        return self._odd(x, positive)

    def _atanh(self, x: Any) -> Any:
        """artanh |x| = ½ log(1 + 2|x|/(1 − |x|))."""

        def positive(a: Any) -> Any:
            ratio = self.builder.fdiv(self.builder.fadd(a, a), self.builder.fsub(self.constant(1, x), a))
            return self.builder.fmul(self.constant(0.5, x), self.log1p(ratio))

        return self._odd(x, positive)


INDEX, POINTER = ir.IntType(64), ir.PointerType()
_C = {INDEX: ctypes.c_int64, POINTER: ctypes.c_void_p}

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()


def index(i: int) -> ir.Constant:
    """A whole number to count and to address with."""
    return ir.Constant(INDEX, i)


def function(*arguments: Any) -> ir.Function:
    """A function to write, of INDEX and POINTER arguments, alone in its module. It returns nothing."""
    of = ir.FunctionType(ir.VoidType(), arguments)
    return ir.Function(ir.Module(), of, "kernel")


def _machine(quick: bool) -> Any:
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=0 if quick else 2,
        jit=True,
    )


def machine_code(written: ir.Function, quick: bool = False) -> bytes:
    """Compile a written function; with `quick` in a third of the time, to code that takes twice as long."""
    parsed, machine = llvm.parse_assembly(str(written.module)), _machine(quick)
    parsed.verify()
    if not quick:
        builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
        builder.getModulePassManager().run(parsed, builder)
    return bytes(machine.emit_object(parsed))


class Code:
    """Machine code of a function, called with whole numbers and addresses while the GIL is free.

    Args:
        content: what `machine_code` gave for this processor.
        arguments: the types of the function's arguments, INDEX or POINTER.
    """

    def __init__(self, content: bytes, arguments: Sequence[ir.Type]):
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(True))
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(content))
        self._engine.finalize_object()  # the code lives as long as the engine
        signature = ctypes.CFUNCTYPE(None, *(_C[a] for a in arguments))
        self._call = signature(self._engine.get_function_address("kernel"))

    @classmethod
    def of(cls, written: ir.Function, quick: bool = False) -> "Code":
        """Compile a written function (`machine_code`)."""
        return cls(machine_code(written, quick), [a.type for a in written.args])

    @classmethod
    def kept(
        cls, write: Callable[[], ir.Function], arguments: Sequence[ir.Type], quick: bool, *parts: object
    ) -> "Code":
        """The code on file for these parts and this processor (`compiled`); written and compiled if none is.

        Args:
            write: writes the function.
            arguments: the types of its arguments.
            quick: as of `machine_code`.
            parts: everything that the function is made of.
        """
        machine = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), llvmlite.__version__
        name = compiled.key(quick, *machine, *parts)
        content = compiled.load(name)
        if content is None:
            content = machine_code(write(), quick)
            compiled.store(name, content)
        return cls(content, arguments)

    def __call__(self, *arguments: int) -> None:
        self._call(*arguments)


def register_bytes() -> int:
    """The widest vector that this processor computes with."""
    has = llvm.get_host_cpu_features()
    return 64 if has.get("avx512f") else 32 if has.get("avx") else 16


@contextmanager
def loop(builder: ir.IRBuilder, start: Any, stop: Any, step: int) -> Iterator[Any]:
    """`for i in range(start, stop, step)` around what is written inside; yields i."""
    with builder.goto_entry_block():  # elsewhere it would take stack in every turn, and no register
        counter = builder.alloca(INDEX)
    builder.store(start, counter)
    test, body, after = (builder.append_basic_block(name) for name in ("test", "body", "after"))
    builder.branch(test)
    builder.position_at_end(test)
    i = builder.load(counter, typ=INDEX)
    builder.cbranch(builder.icmp_signed("<", i, stop), body, after)
    builder.position_at_end(body)
    yield i
    builder.store(builder.add(i, index(step)), counter)
    builder.branch(test)
    builder.position_at_end(after)

"""Machine code for this processor, from LLVM's intermediate language: what `lanes` and `distances` share.

Needs llvmlite (`pip install 'alignpro[native]'`); `scale` asks whether it is there.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

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


class Code:
    """A written function, compiled; called with whole numbers and addresses, while the GIL is free.

    With `quick` it is compiled in a third of the time, to code that takes about twice as long.
    """

    def __init__(self, written: ir.Function, quick: bool = False):
        parsed = llvm.parse_assembly(str(written.module))
        parsed.verify()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(),
            features=llvm.get_host_cpu_features().flatten(),
            opt=0 if quick else 2,
            jit=True,
        )
        if not quick:
            builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
            builder.getModulePassManager().run(parsed, builder)
        self._engine = llvm.create_mcjit_compiler(parsed, machine)  # the code lives as long as this
        self._engine.finalize_object()
        signature = ctypes.CFUNCTYPE(None, *(_C[a.type] for a in written.args))
        self._call = signature(self._engine.get_function_address("kernel"))

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

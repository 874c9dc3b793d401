"""The fixture livepatches as declared, and raw access to guest memory for tests."""

from pathlib import Path
from typing import Any

from klpemu import Func, Kernel, Patch

BUILD = Path(__file__).resolve().parents[2] / "fixtures" / "build"

AREA = Func("area_of", "fixed_area_of")
PERIMETER = Func("perimeter_of", "fixed_perimeter_of")
AREA_IN_CM = Func("area_of", "area_in_cm")
PERIMETER_IN_CM = Func("perimeter_of", "perimeter_in_cm")
CHECKED_PERIMETER = Func("perimeter_of", "checked_perimeter_of")


def livepatch(code: str, *funcs: Func, replace: bool = False, name: str | None = None) -> Patch:
    """A livepatch of vmlinux with the code of fixtures/build/<code>.o."""
    return Patch(name or code, {"vmlinux": funcs}, code=BUILD / f"{code}.o", replace=replace)


def fix_area(*, replace: bool = False, name: str | None = None) -> Patch:
    """area_of(3, 4) becomes 12, perimeter_of(3, 4) becomes 14."""
    return livepatch("fix_area", AREA, PERIMETER, replace=replace, name=name)


def fix_area2(*, replace: bool = False, name: str | None = None) -> Patch:
    """The second version: 120000 and 1400."""
    return livepatch("fix_area2", AREA_IN_CM, PERIMETER_IN_CM, replace=replace, name=name)


def fix_shapes(*, name: str | None = None) -> Patch:
    """Cumulative: replaces, and drops area_of."""
    return livepatch("fix_shapes", CHECKED_PERIMETER, replace=True, name=name)


class Raw:
    """Guest memory, read and written past everything klpemu offers."""

    def __init__(self, kernel: Kernel) -> None:
        self.space = kernel.machine.space
        self.layouts = kernel.machine.layouts
        self.symbol = kernel.machine.vmlinux.symbols.__getitem__  # per-CPU ones are offsets

    def u64(self, address: int) -> int:
        return int.from_bytes(self.space.read(address, 8), "little")

    def put(self, address: int, value: int, size: int = 8) -> bytes:
        """Store a number; returns the bytes that were there."""
        before = self.space.read(address, size)
        self.space.write(address, (value % (1 << 8 * size)).to_bytes(size, "little"))
        return before

    def flip(self, address: int, mask: int = 0xFF) -> int:
        """Change one byte; returns what it was."""
        byte = self.space.read(address, 1)[0]
        self.space.write(address, bytes([byte ^ mask]))
        return byte

    def member(self, struct: str, address: int, member: str) -> int:
        """Address of a member."""
        return address + self.layouts.offsetof(struct, member)

    def view(self, struct: str, address: int) -> Any:
        """A view that goes to memory directly: no doors, no events."""
        return self.layouts.view(struct, self.space, address)

    def klp_ops(self, function: int) -> int:
        """Address of the klp_ops of a function, found by walking the lists here."""
        head = self.symbol("klp_ops")
        at = self.u64(head)
        while at != head:
            ops = at - self.layouts.offsetof("klp_ops", "node")
            if self.view("klp_func", self.funcs(ops)[0]).old_func == function:
                return ops
            at = self.u64(at)
        raise AssertionError(f"no klp_ops of {function:#x}")

    def funcs(self, ops: int) -> list[int]:
        """Addresses of the klp_funcs on a func_stack, newest first."""
        head = self.member("klp_ops", ops, "func_stack")
        found, at = [], self.u64(head)
        while at != head:
            found.append(at - self.layouts.offsetof("klp_func", "stack_node"))
            at = self.u64(at)
        return found

    def trampoline(self, ops: int) -> int:
        """Address of the private trampoline of a klp_ops."""
        return int(self.view("klp_ops", ops).fops.trampoline)

    def current(self, kernel: Kernel) -> int:
        """Address of the task_struct of the task that does what the host asks for."""
        return kernel.machine.init_task.struct

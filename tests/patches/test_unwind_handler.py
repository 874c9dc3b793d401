"""The stack of a redirected call can be walked at every instruction, trampoline and handler included."""

import pytest
from livepatches import fix_area
from shadow_stack import execute_with_shadow

from klpemu import Kernel

FUNCTIONS = ["area_of", "perimeter_of"]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_frame_of_a_redirected_call_is_found(kernel: Kernel, function: str) -> None:
    """Only between the handler's answer and the trampoline's return is the stack unreliable, as in a kernel:

    the return address is the first byte of the new function there, and no call stands before it.
    """
    kernel.enable(fix_area())
    machine, entry = kernel.machine, kernel.address_of(function)
    new_func = next(address for name, address in kernel.enabled[0].new_func.items() if function in name)
    unreliable = reliable = 0
    for registers, expected in execute_with_shadow(machine, entry, 3, 4):
        trace = machine.unwinder.walk(registers)
        if trace.unreliable:
            assert new_func in expected[1:], machine.kallsyms.describe(registers["rip"])
            unreliable += 1
        else:
            assert list(trace.entries) == expected, machine.kallsyms.describe(registers["rip"])
            reliable += 1
    assert reliable > 40
    assert unreliable <= 20

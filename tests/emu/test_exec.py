"""What guest code learns of a task's name."""

import pytest
from machines import boot


@pytest.mark.parametrize(("size", "stored"), [(16, b"init" + bytes(12)), (4, b"ini\0"), (1, b"\0")])
def test_the_name_of_a_task_fills_the_buffer_and_ends_in_it(size: int, stored: bytes) -> None:
    machine = boot()
    buffer = machine.slab.kzalloc(17, "buffer")
    machine.space.write(buffer, b"x" * 17)
    task = machine.tasks[0]
    assert machine.call(machine.symbol("__get_task_comm"), buffer, size, task.struct) == buffer
    assert machine.space.read(buffer, size + 1) == stored + b"x"

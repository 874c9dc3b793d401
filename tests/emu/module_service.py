"""The system calls that load and remove modules, as a task makes them."""

from elf.image import Image
from emu.machine import Machine
from emu.module import LoadedObject


def init_module(machine: Machine, image: Image, parameters: str = "") -> LoadedObject:
    loaded = machine.service("init_module", lambda: machine.modules.init_module(image, parameters))
    settle(machine)
    assert isinstance(loaded, LoadedObject)
    return loaded


def delete_module(machine: Machine, name: str) -> None:
    machine.service("delete_module", lambda: machine.modules.delete_module(name))


def settle(machine: Machine) -> None:
    """Let the kworker free what is only needed during init."""
    machine.run(lambda: machine.workqueue.is_empty)

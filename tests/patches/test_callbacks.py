"""Callbacks around the patching of an object: which are called, when, for what, and on whose stack.

The rules are those of Documentation/livepatch/callbacks.rst and kernel/livepatch/core.h.  klp_callbacks.c
writes down each call in guest memory.
"""

from dataclasses import dataclass
from typing import Any

import pytest
from livepatches import BUILD, fix_area, fix_area2

from emu.errno import KernelErrno
from klpemu import Func, Kernel, Patch

CALLBACKS = BUILD / "klp_callbacks.ko"
BUSY = BUILD / "klp_callbacks_busy.ko"
CUMULATIVE = BUILD / "klp_callbacks2.ko"
LAMP = BUILD / "lamp.ko"
STA_INFO = BUILD / "sta_info.o"
WHICH = {1: "pre_patch", 2: "post_patch", 3: "pre_unpatch", 4: "post_unpatch"}
OBJECTS = {"v": "vmlinux", "l": "lamp", "s": "sta_info"}


@dataclass(frozen=True)
class Call:
    """One call of a callback, as the livepatch's own code saw it."""

    which: str
    object: str
    pid: int
    stack: int
    patched: bool
    loaded: bool

    def __str__(self) -> str:
        return f"{self.which} {self.object}"


class Watched:
    """The calls of one module's callbacks; what it wrote is still there when it has been unloaded."""

    def __init__(self, kernel: Kernel, name: str = "klp_callbacks") -> None:
        self._kernel = kernel
        self._calls = kernel.address_of(f"{name}:callback_calls")
        self._count = kernel.address_of(f"{name}:callback_count")

    def calls(self) -> list[Call]:
        """All calls so far."""
        return [self._call(self._calls + 48 * number) for number in range(self._number(self._count))]

    def _number(self, address: int) -> int:
        return int.from_bytes(self._kernel.machine.space.read(address, 8), "little")

    def _call(self, at: int) -> Call:
        which, obj, pid, stack, patched, loaded = (self._number(at + 8 * index) for index in range(6))
        return Call(WHICH[which], OBJECTS[chr(obj)], pid, stack, bool(patched), bool(loaded))


class Spy:
    """The calls that Python sees: of any patch, also one that is gone already."""

    def __init__(self, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        hub, describe = kernel.machine.hub, kernel.machine.kallsyms.describe
        call_guest = hub.call_guest

        def call(function: int, *arguments: int) -> int:
            result: int = call_guest(function, *arguments)
            if not arguments:
                return result  # the module's init or exit
            obj = kernel.machine.view("klp_object", arguments[0])
            name = kernel.klp.string(obj.name) if obj.name else "vmlinux"
            place = describe(function)
            self.calls.append(f"{place.split('+')[0]} {name} {place.split('[')[1].rstrip(']')}")
            return result

        monkeypatch.setattr(hub, "call_guest", call)

    def take(self) -> list[str]:
        """What came since the last time."""
        taken, self.calls[:] = list(self.calls), []
        return taken


@pytest.fixture
def spy(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(kernel, monkeypatch)


def sleeping(kernel: Kernel, msecs: int = 2500) -> None:
    """A task that is asleep in nap(), which the fixture patches."""
    kernel.tasks.spawn("sleeper", [f"nap({msecs})"], repeat=None)
    kernel.tasks.run(100)


def stack_of(kernel: Kernel, call: Call) -> str:
    """Whose stack a callback ran on."""
    for task in (*kernel.machine.tasks, *(rq.idle for rq in kernel.machine.sched.runqueues)):
        bottom = kernel.machine.view("task_struct", task.struct).stack
        if bottom <= call.stack < bottom + (1 << 14):
            return task.name
    return "nobody's"


def line_of(kernel: Kernel, text: str) -> int:
    """The index of a log line."""
    return next(number for number, line in enumerate(kernel.log) if text in line)


# Enabling and disabling.


def test_each_loaded_object_has_its_callbacks_in_the_order_of_the_objects(kernel: Kernel, spy: Spy) -> None:
    kernel.load_module(LAMP)
    kernel.insmod(CALLBACKS)
    assert spy.take() == [
        "pre_patch vmlinux klp_callbacks",
        "pre_patch_lamp lamp klp_callbacks",
        "post_patch vmlinux klp_callbacks",
        "post_patch lamp klp_callbacks",
    ]
    kernel.disable("klp_callbacks")
    assert spy.take() == [
        "pre_unpatch vmlinux klp_callbacks",
        "pre_unpatch lamp klp_callbacks",
        "post_unpatch vmlinux klp_callbacks",
        "post_unpatch lamp klp_callbacks",
    ]
    kernel.verify().raise_for_findings()


def test_an_object_that_is_not_loaded_has_none(kernel: Kernel) -> None:
    kernel.insmod(CALLBACKS)
    assert [str(each) for each in Watched(kernel).calls()] == ["pre_patch vmlinux", "post_patch vmlinux"]


def test_post_unpatch_is_called_where_there_is_no_pre_patch(kernel: Kernel, spy: Spy) -> None:
    """A pre_patch that is not there counts as one that has not failed."""
    kernel.load_module(STA_INFO)
    kernel.insmod(CALLBACKS)
    kernel.disable("klp_callbacks")
    assert [each for each in spy.take() if "sta_info" in each] == ["post_unpatch sta_info klp_callbacks"]


def test_pre_patch_comes_before_the_object_is_patched_and_post_unpatch_after(kernel: Kernel) -> None:
    kernel.load_module(LAMP)
    kernel.insmod(CALLBACKS)
    calls = {str(each): each for each in Watched(kernel).calls()}
    assert not calls["pre_patch vmlinux"].patched
    assert not calls["pre_patch lamp"].patched
    assert calls["post_patch vmlinux"].patched
    assert calls["post_patch lamp"].patched
    assert calls["pre_patch lamp"].loaded
    assert not calls["pre_patch vmlinux"].loaded, "vmlinux is no module"


def test_pre_unpatch_comes_before_the_object_is_unpatched(kernel: Kernel) -> None:
    sleeping(kernel)
    kernel.insmod(CALLBACKS)
    kernel.tasks.wait_for_transition()
    sleeping(kernel)
    watched = Watched(kernel)
    kernel.disable("klp_callbacks")
    last = watched.calls()[-1]
    assert (str(last), last.patched) == ("pre_unpatch vmlinux", True)
    kernel.tasks.wait_for_transition()


# Who calls, and when.


def test_who_enables_calls_pre_patch_and_who_completes_calls_post_patch(kernel: Kernel) -> None:
    """A transition that somebody holds up is completed by the kworker, on its stack."""
    sleeping(kernel)
    kernel.insmod(CALLBACKS)
    watched = Watched(kernel)
    assert [str(each) for each in watched.calls()] == ["pre_patch vmlinux"]
    kernel.tasks.wait_for_transition()
    pre, post = watched.calls()
    assert (str(post), stack_of(kernel, pre)) == ("post_patch vmlinux", "init")
    assert stack_of(kernel, post) == "kworker/0:1"
    pids = {task.name: kernel.machine.pid_of(task) for task in kernel.machine.tasks}
    assert (pre.pid, post.pid) == (pids["init"], pids["kworker/0:1"])


def test_a_transition_that_nobody_holds_up_is_completed_by_who_enables(kernel: Kernel) -> None:
    kernel.insmod(CALLBACKS)
    assert [stack_of(kernel, each) for each in Watched(kernel).calls()] == ["init", "init"]


def test_who_disables_calls_pre_unpatch_and_who_completes_calls_post_unpatch(kernel: Kernel) -> None:
    kernel.tasks.spawn("sleeper", ["nap(2500)"], repeat=None)
    kernel.insmod(CALLBACKS)
    kernel.tasks.wait_for_transition()
    watched = Watched(kernel)
    kernel.tasks.run(3000)
    stacks = []
    call_guest = kernel.machine.hub.call_guest

    def noting(function: int, *arguments: int) -> int:
        result = call_guest(function, *arguments)
        if arguments:  # no module's exit
            stacks.append((str(watched.calls()[-1]), stack_of(kernel, watched.calls()[-1])))
        return int(result)

    kernel.machine.hub.call_guest = noting  # type: ignore[method-assign] # the module is gone afterwards
    kernel.disable("klp_callbacks")
    kernel.tasks.wait_for_transition()
    assert stacks == [("pre_unpatch vmlinux", "init"), ("post_unpatch vmlinux", "kworker/0:1")]


def test_post_patch_comes_when_all_tasks_have_switched(kernel: Kernel) -> None:
    """Between "completing" and "complete"."""
    sleeping(kernel)
    kernel.insmod(CALLBACKS)
    lines: list[str] = []
    call_guest = kernel.machine.hub.call_guest

    def noting(function: int, *arguments: int) -> int:
        lines.append(kernel.log[-1])
        states = {
            kernel.machine.view("task_struct", task.struct).patch_state for task in kernel.machine.tasks
        }
        assert states == {-1}
        return int(call_guest(function, *arguments))

    kernel.machine.hub.call_guest = noting  # type: ignore[method-assign] # for this transition
    kernel.tasks.wait_for_transition()
    assert lines == ["livepatch: 'klp_callbacks': completing patching transition"]
    assert kernel.log[-1] == "livepatch: 'klp_callbacks': patching complete"


# Failures.


def test_a_pre_patch_that_fails_refuses_the_patch_and_undoes_the_rest(kernel: Kernel, spy: Spy) -> None:
    """The object that refused has no post_unpatch; those before it have."""
    kernel.load_module(STA_INFO)
    kernel.load_module(LAMP)
    live = dict(kernel.machine.slab.live)
    with pytest.raises(KernelErrno) as caught:
        kernel.insmod(BUSY)
    assert caught.value.name == "EBUSY"
    assert kernel.log == [
        "livepatch: enabling patch 'klp_callbacks_busy'",
        "livepatch: 'klp_callbacks_busy': initializing patching transition",
        "livepatch: pre-patch callback failed for object 'lamp'",
        "livepatch: failed to enable patch 'klp_callbacks_busy'",
        "livepatch: 'klp_callbacks_busy': canceling patching transition, going to unpatch",
        "livepatch: 'klp_callbacks_busy': completing unpatching transition",
        "livepatch: 'klp_callbacks_busy': unpatching complete",
    ]
    assert spy.take() == [
        "pre_patch vmlinux klp_callbacks_busy",
        "pre_patch_lamp lamp klp_callbacks_busy",
        "post_unpatch vmlinux klp_callbacks_busy",
        "post_unpatch sta_info klp_callbacks_busy",
    ]
    assert "klp_callbacks_busy" not in kernel.machine.modules.objects
    assert dict(kernel.machine.slab.live) == live
    kernel.verify().raise_for_findings()


def test_an_object_that_cannot_be_patched_has_its_post_unpatch(kernel: Kernel, spy: Spy, raw: Any) -> None:
    """Its pre_patch has not failed, so it is called, although the object never was patched."""
    raw.put(raw.symbol("ftrace_disabled"), 1, 4)
    with pytest.raises(KernelErrno):
        kernel.insmod(CALLBACKS)
    assert spy.take() == ["pre_patch vmlinux klp_callbacks", "post_unpatch vmlinux klp_callbacks"]


def test_a_module_whose_pre_patch_fails_is_refused(kernel: Kernel, spy: Spy) -> None:
    """-EBUSY for lamp; the patch below it, which had applied, is undone; nobody's post_unpatch is missing."""
    kernel.enable(Patch("below", {"lamp": [Func("lamp_light", "fixed_area_of")]}, BUILD / "fix_area.o"))
    kernel.insmod(BUSY)
    spy.take()
    lines = len(kernel.log)
    with pytest.raises(KernelErrno) as caught:
        kernel.load_module(LAMP)
    assert caught.value.name == "EBUSY"
    assert kernel.log[lines:] == [
        "livepatch: applying patch 'below' to loading module 'lamp'",
        "livepatch: applying patch 'klp_callbacks_busy' to loading module 'lamp'",
        "livepatch: pre-patch callback failed for object 'lamp'",
        "livepatch: patch 'klp_callbacks_busy' failed for module 'lamp', refusing to load module 'lamp'",
        "livepatch: reverting patch 'below' on unloading module 'lamp'",
    ]
    assert spy.take() == ["pre_patch_lamp lamp klp_callbacks_busy"]
    assert "lamp" not in kernel.machine.modules.objects
    kernel.verify().raise_for_findings()
    assert kernel.call("area_of", 3, 4) == 12, "the patch itself stays"


# Modules that come and go.


def test_a_module_that_comes_and_goes_has_all_four(kernel: Kernel, spy: Spy) -> None:
    kernel.insmod(CALLBACKS)
    spy.take()
    kernel.load_module(LAMP)
    assert spy.take() == ["pre_patch_lamp lamp klp_callbacks", "post_patch lamp klp_callbacks"]
    kernel.unload_module("lamp")
    assert spy.take() == ["pre_unpatch lamp klp_callbacks", "post_unpatch lamp klp_callbacks"]
    kernel.disable("klp_callbacks")
    assert not any("lamp lamp" in each for each in spy.take()), "it is not there any more"


def test_a_module_that_comes_in_a_transition_has_its_post_patch_at_the_end_of_it(
    kernel: Kernel, spy: Spy
) -> None:
    sleeping(kernel)
    kernel.insmod(CALLBACKS)
    spy.take()
    kernel.load_module(LAMP)
    assert spy.take() == ["pre_patch_lamp lamp klp_callbacks"]
    kernel.tasks.wait_for_transition()
    assert spy.take() == ["post_patch vmlinux klp_callbacks", "post_patch lamp klp_callbacks"]


def test_a_module_that_goes_in_a_transition_has_no_pre_unpatch(kernel: Kernel, spy: Spy) -> None:
    kernel.load_module(LAMP)
    sleeping(kernel)
    kernel.insmod(CALLBACKS)
    spy.take()
    kernel.unload_module("lamp")
    assert spy.take() == ["post_unpatch lamp klp_callbacks"]
    kernel.tasks.wait_for_transition()
    assert spy.take() == ["post_patch vmlinux klp_callbacks"]


# Reversed and replaced.


def test_a_patching_that_is_reversed_ends_with_post_unpatch_alone(kernel: Kernel, spy: Spy) -> None:
    """Neither post_patch nor pre_unpatch: the patch never was complete, and nobody disabled it."""
    sleeping(kernel)
    kernel.insmod(CALLBACKS)
    kernel.reverse("klp_callbacks")
    kernel.tasks.wait_for_transition()
    assert spy.take() == ["pre_patch vmlinux klp_callbacks", "post_unpatch vmlinux klp_callbacks"]


def test_an_unpatching_that_is_reversed_ends_with_post_patch_again(kernel: Kernel, spy: Spy) -> None:
    kernel.tasks.spawn("sleeper", ["nap(2500)"], repeat=None)
    kernel.insmod(CALLBACKS)
    kernel.tasks.wait_for_transition()
    kernel.tasks.run(3000)
    spy.take()
    kernel.disable("klp_callbacks")
    kernel.reverse("klp_callbacks")
    kernel.tasks.wait_for_transition()
    assert spy.take() == ["pre_unpatch vmlinux klp_callbacks", "post_patch vmlinux klp_callbacks"]
    kernel.disable("klp_callbacks")
    kernel.tasks.wait_for_transition()
    assert spy.take()[-1] == "post_unpatch vmlinux klp_callbacks", "its pre_patch still counts"


def test_of_a_replaced_patch_nothing_is_called(kernel: Kernel, spy: Spy) -> None:
    kernel.load_module(LAMP)
    kernel.insmod(CALLBACKS)
    spy.take()
    kernel.insmod(CUMULATIVE)
    assert spy.take() == [
        "pre_patch vmlinux klp_callbacks2",
        "pre_patch_lamp lamp klp_callbacks2",
        "post_patch vmlinux klp_callbacks2",
        "post_patch lamp klp_callbacks2",
    ]
    assert [each.patch.name for each in kernel.enabled] == ["klp_callbacks2"]


def test_independent_patches_call_only_their_own(kernel: Kernel, spy: Spy) -> None:
    kernel.insmod(CALLBACKS)
    spy.take()
    kernel.enable(fix_area())
    kernel.disable("fix_area")
    kernel.enable(fix_area2(replace=True))
    assert spy.take() == [], "not even when it is replaced"

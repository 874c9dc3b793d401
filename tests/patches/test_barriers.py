"""The order of a transition's stores, read back from the event trace; and for each barrier of the kernel,
which reordering it forbids.

On the emulated machine stores become visible in the order of the program, as they do on x86 (SDM Vol. 3A,
"Memory Ordering in P6 and More Recent Processor Families": writes are not reordered with other writes, nor
reads with other reads), so there smp_wmb() and smp_rmb() only hold the compiler back.  A weaker machine
(arm64, powerpc) reorders without them.  What would then be seen is produced here by doing the later store
without the earlier one, and it goes wrong in the way that the barrier's comment in the kernel foretells.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from livepatches import Raw, fix_area

from emu.assembly import Instruction, disassemble
from emu.events import Event, EventKind
from klpemu import Kernel
from patches import core, transition
from patches.handler import KLP_PATCHED, KLP_UNDEFINED, KLP_UNPATCHED

TIF_PATCH_PENDING = 1 << 13


@dataclass(frozen=True)
class Trace:
    """The events of one operation, and where things are."""

    events: list[Event]
    at: dict[str, list[int]]

    def stores(self, what: str, value: int | None = None) -> list[int]:
        """Numbers of the stores to any of the places of that name, of this value if one is given."""
        return [
            event.number
            for event in self.events
            if event.kind is EventKind.STORE
            and event.address in self.at[what]
            and (value is None or int.from_bytes(event.after, "little", signed=True) == value)
        ]

    def flags_set(self) -> list[int]:
        """Numbers of the stores that set TIF_PATCH_PENDING."""
        return [
            event.number
            for event in self.events
            if event.kind is EventKind.STORE
            and event.address in self.at["thread_info.flags"]
            and int.from_bytes(event.after, "little") & TIF_PATCH_PENDING
        ]

    def syncs(self) -> list[int]:
        """Numbers of the klp_synchronize_transition() that had come to an end."""
        return [event.number for event in self.events if event.note == "klp_synchronize_transition"]


def places(kernel: Kernel, raw: Raw) -> dict[str, list[int]]:
    tasks = [*kernel.machine.tasks, *(rq.idle for rq in kernel.machine.sched.runqueues)]
    ops = [raw.klp_ops(kernel.address_of(name)) for name in ("area_of", "perimeter_of")]
    funcs = [func for each in ops for func in raw.funcs(each)]
    return {
        "patch_state": [raw.member("task_struct", task.struct, "patch_state") for task in tasks],
        "thread_info.flags": [raw.member("task_struct", task.struct, "thread_info") for task in tasks],
        "func->transition": [raw.member("klp_func", func, "transition") for func in funcs],
        "func_stack": [raw.member("klp_ops", each, "func_stack") for each in ops],
        "new node": [raw.member("klp_func", func, "stack_node") for func in funcs],
        "klp_target_state": [raw.symbol("klp_target_state")],
        "klp_transition_patch": [raw.symbol("klp_transition_patch")],
    }


@pytest.fixture
def kernel() -> Kernel:
    """Two vCPUs: their idle tasks keep a transition on until the next second, so that it can be looked at."""
    return Kernel.load(cpus=2)


@pytest.fixture
def enabling(kernel: Kernel, raw: Raw) -> Trace:
    number = kernel.machine.events.total
    kernel.enable(fix_area())
    kernel.tasks.wait_for_transition()
    return Trace(kernel.machine.events.since(number), places(kernel, raw))


@pytest.fixture
def disabling(kernel: Kernel, raw: Raw) -> Trace:
    kernel.enable(fix_area())
    kernel.tasks.wait_for_transition()
    at, number = places(kernel, raw), kernel.machine.events.total
    kernel.disable("fix_area")
    kernel.tasks.wait_for_transition()
    return Trace(kernel.machine.events.since(number), at)


def in_order(*groups: list[int]) -> bool:
    """Every store of a group comes before every one of the next; no group is empty."""
    assert all(groups), groups
    return all(max(before) < min(after) for before, after in itertools.pairwise(groups))


# The order that is.


def test_patch_states_then_func_transition_then_func_stack_then_the_pending_flags(enabling: Trace) -> None:
    """smp_wmb() in klp_init_transition(), and the one in __klp_enable_patch()."""
    assert in_order(
        enabling.stores("klp_target_state", KLP_PATCHED),
        enabling.stores("patch_state", KLP_UNPATCHED),
        enabling.stores("func->transition", 1),
        enabling.stores("func_stack"),
        enabling.flags_set(),
        enabling.stores("patch_state", KLP_PATCHED),
        enabling.stores("func->transition", 0)[-2:],  # they are cleared when the patch is initialised, too
        enabling.syncs(),
        enabling.stores("patch_state", KLP_UNDEFINED),
        enabling.stores("klp_target_state", KLP_UNDEFINED),
        enabling.stores("klp_transition_patch", 0),
    )


def test_when_disabling_func_transition_comes_before_the_pending_flags(disabling: Trace) -> None:
    """smp_wmb() in klp_init_transition(), and the one in __klp_disable_patch()."""
    assert in_order(
        disabling.stores("klp_target_state", KLP_UNPATCHED),
        disabling.stores("patch_state", KLP_PATCHED),
        disabling.stores("func->transition", 1),
        disabling.flags_set(),
        disabling.stores("patch_state", KLP_UNPATCHED),
        disabling.stores("func_stack") or disabling.stores("new node"),
        disabling.syncs(),
        disabling.stores("func->transition", 0),
        disabling.stores("patch_state", KLP_UNDEFINED),
    )


def test_a_node_is_whole_before_its_func_stack_leads_to_it(enabling: Trace) -> None:
    """list_add_rcu(): rcu_assign_pointer(), a store-release."""
    assert in_order(enabling.stores("new node")[:2], enabling.stores("func_stack")[-1:]) or in_order(
        [min(enabling.stores("new node"))], [max(enabling.stores("func_stack"))]
    )


def test_a_reversal_clears_every_flag_and_waits_before_it_sets_the_first(kernel: Kernel, raw: Raw) -> None:
    """klp_reverse_transition(): whoever is inside klp_update_patch_state() comes to an end in between."""
    kernel.enable(fix_area())
    at, number = places(kernel, raw), kernel.machine.events.total
    kernel.reverse("fix_area")
    trace = Trace(kernel.machine.events.since(number), at)
    cleared = [each for each in trace.stores("thread_info.flags") if each not in trace.flags_set()]
    # swapper/1, the one that had not switched, is the one whose flag is cleared.
    assert in_order(trace.stores("klp_target_state", KLP_UNPATCHED), cleared[:1], trace.syncs())
    assert min(trace.flags_set()) > trace.syncs()[0]


def handler(kernel: Kernel) -> Iterator[Instruction]:
    start, end = (kernel.address_of(name) for name in ("klp_ftrace_handler", "klp_ftrace_handler_end"))
    return disassemble(kernel.machine.space.read(start, end - start), start)


def test_the_handler_reads_func_stack_then_transition_then_patch_state(kernel: Kernel) -> None:
    """The two smp_rmb() of klp_ftrace_handler(): read from its machine code."""
    offset = kernel.machine.layouts.offsetof
    node = offset("klp_func", "stack_node")
    code = [str(each) for each in handler(kernel)]
    stack = next(i for i, text in enumerate(code) if text == "mov r11, qword ptr [r10]")
    moving = next(
        i for i, text in enumerate(code) if f"[r11 + {offset('klp_func', 'transition') - node:#x}]" in text
    )
    state = next(
        i for i, text in enumerate(code) if f"[rax + {offset('task_struct', 'patch_state'):#x}]" in text
    )
    assert stack < moving < state


# What each barrier forbids: the later store is seen, the earlier one is not.


@dataclass(frozen=True)
class Reordering:
    """One barrier, what it orders, and what is seen without it."""

    barrier: str
    earlier: str
    later: str
    forbids: str
    see: Callable[[Kernel, Raw], str]


def _top_func(kernel: Kernel, raw: Raw) -> int:
    return raw.funcs(raw.klp_ops(kernel.address_of("area_of")))[0]


def _init(kernel: Kernel, raw: Raw) -> str:
    func = _top_func(kernel, raw)
    raw.put(raw.member("klp_func", func, "transition"), 1, 1)  # seen; patch_state is KLP_UNDEFINED still
    kernel.call("area_of", 3, 4)
    return kernel.machine.warnings[-1]


def _init_target(kernel: Kernel, raw: Raw) -> str:
    task = kernel.machine.init_task.struct
    raw.put(raw.member("task_struct", task, "thread_info"), TIF_PATCH_PENDING)  # seen; no target state
    kernel.machine.service("exit to user mode", lambda: transition.klp_update_patch_state(kernel.klp, task))
    return f"patch_state {raw.view('task_struct', task).patch_state}"


def _enable(kernel: Kernel, raw: Raw) -> str:
    task = kernel.machine.init_task.struct
    raw.put(raw.member("task_struct", task, "patch_state"), KLP_UNPATCHED, 4)
    return f"an unpatched task gets {kernel.call('area_of', 3, 4)}"  # on the func_stack, transition 0


def _disable(kernel: Kernel, raw: Raw) -> str:
    task = kernel.machine.init_task.struct
    raw.put(raw.symbol("klp_target_state"), KLP_UNPATCHED, 4)
    raw.put(raw.member("task_struct", task, "patch_state"), KLP_PATCHED, 4)
    raw.put(raw.member("task_struct", task, "thread_info"), TIF_PATCH_PENDING)  # seen; transition is 0
    kernel.machine.service("exit to user mode", lambda: transition.klp_update_patch_state(kernel.klp, task))
    state = raw.view("task_struct", task).patch_state
    return f"a task of state {state} gets {kernel.call('area_of', 3, 4)}"


def _complete(kernel: Kernel, raw: Raw) -> str:
    func, task = _top_func(kernel, raw), kernel.machine.init_task.struct
    raw.put(raw.member("klp_func", func, "transition"), 1, 1)  # read before; the state is cleared meanwhile
    raw.put(raw.member("task_struct", task, "patch_state"), KLP_UNDEFINED, 4)
    kernel.call("area_of", 3, 4)
    return kernel.machine.warnings[-1]


REORDERINGS = [
    Reordering(
        "smp_wmb() in klp_init_transition()",
        "task->patch_state",
        "func->transition",
        "a func in transition seen by a task without a state",
        _init,
    ),
    Reordering(
        "smp_wmb() in klp_init_transition()",
        "klp_target_state",
        "TIF_PATCH_PENDING",
        "a task that switches to KLP_UNDEFINED",
        _init_target,
    ),
    Reordering(
        "smp_wmb() in __klp_enable_patch()",
        "func->transition",
        "ops->func_stack",
        "a new func seen as settled: tasks get it that have not switched",
        _enable,
    ),
    Reordering(
        "smp_wmb() in __klp_disable_patch()",
        "func->transition",
        "TIF_PATCH_PENDING",
        "a task that has switched and still gets the patch's func",
        _disable,
    ),
    Reordering(
        "klp_synchronize_transition() in klp_complete_transition()",
        "func->transition = false",
        "patch_state = KLP_UNDEFINED",
        "a handler that took the func to be in transition and then reads no state",
        _complete,
    ),
]
SEEN = {
    _init: "KLP_UNDEFINED",
    _init_target: "patch_state -1",
    _enable: "an unpatched task gets 12",
    _disable: "a task of state 0 gets 12",
    _complete: "KLP_UNDEFINED",
}


@pytest.mark.parametrize("case", REORDERINGS, ids=lambda case: f"{case.barrier}: {case.earlier}")
def test_without_a_barrier_the_later_store_alone_is_seen_and_goes_wrong(case: Reordering) -> None:
    kernel = Kernel.load()
    raw = Raw(kernel)
    kernel.enable(fix_area())
    assert SEEN[case.see] in case.see(kernel, raw), case.forbids


def test_a_func_that_is_removed_may_be_chosen_if_the_flag_is_cleared_without_waiting() -> None:
    """klp_synchronize_transition() between klp_unpatch_objects() and func->transition = false.

    A handler that found the func before it was unlinked, and reads its flag after it was cleared, takes it
    for settled: here the func's memory as such a handler sees it.
    """
    kernel = Kernel.load()
    raw = Raw(kernel)
    kernel.enable(fix_area())
    func, task = _top_func(kernel, raw), kernel.machine.init_task.struct
    raw.put(raw.member("task_struct", task, "patch_state"), KLP_UNPATCHED, 4)
    raw.put(raw.member("klp_func", func, "transition"), 1, 1)
    assert kernel.call("area_of", 3, 4) == 7, "in transition, unpatched: the original"
    raw.put(raw.member("klp_func", func, "transition"), 0, 1)
    assert kernel.call("area_of", 3, 4) == 12, "cleared too early: the func that is on its way out"


def test_a_task_inside_klp_update_patch_state_holds_a_reversal_up() -> None:
    """It has cleared its flag and not stored the target state yet: klp_synchronize_transition() waits."""
    kernel = Kernel.load(cpus=2)
    machine = kernel.machine
    kernel.enable(fix_area())
    kernel.tasks.run(4)  # swapper/1 goes through its idle loop; the transition ends at the next second
    other = machine.tasks[1]
    raw = Raw(kernel)
    flags = raw.member("task_struct", other.struct, "thread_info")
    raw.put(flags, TIF_PATCH_PENDING)
    raw.put(raw.member("task_struct", other.struct, "patch_state"), KLP_UNPATCHED, 4)
    reached = []

    class Doors:
        interleaves = True

        def pick(self, tasks, finishing):  # type: ignore[no-untyped-def]
            """The other one up to the door of its second store, then the reversal as far as it comes."""
            if other in tasks and raw.u64(flags) & TIF_PATCH_PENDING:
                return other, None
            if machine.init_task in tasks and not reached:
                return machine.init_task, None
            reached.append(raw.view("task_struct", other.struct).patch_state)
            return (other if other in tasks else tasks[0]), None

    machine.hub.serve(other, "exit", lambda: transition.klp_update_patch_state(kernel.klp, other.struct))
    machine.hub.schedule = Doors()
    number = machine.events.total
    guest = kernel.klp.transition_patch
    machine.service("reverse", lambda: core.enabled_store(kernel.klp, guest, False))
    events = machine.events.since(number)
    stored = next(
        e.number for e in events if e.address == raw.member("task_struct", other.struct, "patch_state")
    )
    waited = next(e.number for e in events if e.note == "klp_synchronize_transition")
    assert stored < waited

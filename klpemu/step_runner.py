"""Performing steps on a kernel and verifying after each: what `run`, `verify` and `demo` have in common."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from elf.errors import KlpemuError
from emu.errno import KernelErrno
from emu.ftrace import FtraceBug
from emu.hub import RunToCompletion
from emu.schedules import Directed, Explicit, RoundRobin, Seeded
from emu.task import Task
from emu.timer import HZ
from emu.traps import GuestFault
from klpemu.call_trace import CallTrace, call_trace
from klpemu.expectations import UNCHANGED, WARNS, Expectations
from klpemu.file_steps import LOOKS, contents_of, write
from klpemu.fixtures import locate, shown
from klpemu.ftrace_users import FtraceUsers
from klpemu.function_state import FunctionState, function_state, has_site, patched_functions
from klpemu.kernel import Kernel
from klpemu.registered import enable, register, registered, unregister
from klpemu.scenario import REGISTRATION, Action, DeclaredTask, Scenario, Step
from klpemu.task_table import TaskPicture, task_picture
from klpemu.tasks import Deadlock, Stuck, TaskState, TransitionStuck
from klpemu.timeline import Moment, Timeline
from klpemu.watched_schedule import WatchedSchedule, is_settled
from patches.invariants.before_and_after import (
    RESTORES,
    RestoredText,
    State,
    failures_leave_the_state_before,
    state_of,
)
from patches.invariants.finding import Finding, Report
from patches.invariants.subject import Subject
from patches.livepatch import VMLINUX

__all__ = ["StepResult", "StepRunner"]

SETTLING: Final = 60 * HZ  # virtual jiffies in which whatever the kernel is in the middle of must end

# Steps that are about no function: only what has changed by the way is shown.
_LETS_TIME_GO_BY: Final = (Action.SPAWN, Action.RUN, Action.WAIT, Action.WRITE, *LOOKS)
_STUCK: Final = {
    Deadlock: "somebody_can_go_on",
    TransitionStuck: "the_transition_ends",
    Stuck: "kernel_work_ends",
}


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did: the checks after it, the lines it logged, and the functions it was about as they stand
    now.

    `returned` is RAX after a call, `trace` the executed stream of a traced one, `error` an expected error
    that came, `fault` what stopped the guest without being expected: then no further step makes sense.
    `not_loaded` are the objects whose functions an enabled patch will replace once they are loaded.

    In a scenario with tasks `timeline` is what happened during the step and `tasks` how all tasks stand now;
    both are None in others.  `in_the_way` are the tasks because of which a step could not end, `expected`
    the findings that it expects.  `contents` are the lines of what a step has looked at.
    """

    step: Step
    report: Report
    log: tuple[str, ...] = ()
    functions: tuple[FunctionState, ...] = ()
    returned: int | None = None
    trace: CallTrace | None = None
    error: str = ""
    fault: KlpemuError | None = None
    not_loaded: tuple[str, ...] = ()
    timeline: tuple[Moment, ...] | None = None
    tasks: TaskPicture | None = None
    in_the_way: tuple[TaskState, ...] = ()
    expected: tuple[Finding, ...] = ()
    contents: tuple[str, ...] | None = None


class StepRunner:
    """Boots the kernel of a scenario and performs steps on it, those of the scenario or others.

    In a scenario with tasks `timeline` follows what happens, and `watch` is called again and again while
    steps are performed, never in the middle of a service.
    """

    def __init__(self, scenario: Scenario, *, att: bool = False) -> None:
        self.scenario = scenario
        self.kernel = Kernel.load(
            scenario.kernel,
            cpus=scenario.cpus,
            observe=bool(scenario.tasks),
            handler=scenario.handler,
            cpu=scenario.cpu,
            system_map=scenario.system_map,
        )
        self.timeline: Timeline | None = None
        self.watch: Callable[[], None] = lambda: None
        self._ftrace_users = FtraceUsers(self.kernel)
        self._restored_text = RestoredText()
        self._att = att
        # The functions that were ever patched: their sites are shown to the end.
        self._patched: dict[str, None] = {}
        self._functions_before: dict[str, FunctionState] = {}
        self._names: dict[str, str] = {}
        self._failed: set[Task] = set()
        self._budget = scenario.budget or self.kernel.machine.hub.instruction_budget
        for module in scenario.modules:
            self.kernel.load_module(module)
        if scenario.tasks:
            self.timeline = Timeline(self.kernel.machine)
            for task in scenario.tasks.values():
                if task.start:
                    self._start(task)
        self._let_decide()

    @property
    def tracers(self) -> list[str]:
        """The names of the other users of ftrace that are registered."""
        return self._ftrace_users.names

    def name_of(self, target: str) -> str:
        """What the patch is called that a step names: once it was loaded, as its modinfo says."""
        return self._names.get(target, target)

    def boot(self) -> StepResult:
        """Verify the kernel before anything is done to it."""
        step = Step(Action.BOOT)
        report = self.kernel.verify(step.name)
        return StepResult(
            step, report, tuple(self.kernel.log), timeline=self._moments(0), tasks=self._tasks()
        )

    def perform(self, step: Step) -> StepResult:
        """Perform a step and verify; an error that it does not expect is raised, a guest's failure is not."""
        logged, warned = len(self.kernel.log), len(self.kernel.machine.warnings)
        moments = len(self.timeline.moments) if self.timeline is not None else 0
        error: KlpemuError | None = None
        returned: int | None = None
        trace: CallTrace | None = None
        contents: tuple[str, ...] | None = None
        if step.fail_alloc:
            self.kernel.machine.slab.fails = lambda tag: step.fail_alloc in tag
        before = state_of(self.kernel.subject()) if step.error else None
        hub = self.kernel.machine.hub
        schedule = hub.schedule
        if step.schedule:
            hub.schedule = WatchedSchedule(Directed(step.schedule), self._watched)
        try:
            if step.call is not None:
                returned, trace = self._call(step)
            elif step.action in LOOKS:
                contents = contents_of(self.kernel, step)
            else:
                self._operations[step.action](self, step)
        except KlpemuError as caught:
            error = caught
        self.kernel.machine.slab.fails = lambda tag: False
        hub.schedule = schedule
        try:
            self._settle()
        except KlpemuError as caught:
            error = error or caught
        expectations = Expectations(step)
        fault = self._judge(step, error, expectations)
        log = tuple(self.kernel.log[logged:])
        expectations.compare(error, log, returned, trace, contents)
        tasks = self._tasks()
        if self.timeline is not None and tasks is not None:
            expectations.compare_tasks(tasks.transition, tasks.states, self.timeline.returned())
        subject = self.kernel.subject()
        reports = [
            self.kernel.verify(step.name, subject),
            self._warnings(step, warned),
            self._compared(step, before, error, subject),
        ]
        found, expected = expectations.expected_findings(Report.merged(reports, step.name))
        return StepResult(
            step,
            Report.merged([found, expectations.report()], step.name),
            log,
            self._functions(step),
            returned,
            trace,
            shown(error) if error is not None and step.error else "",
            fault,
            self._not_loaded() if step.action in (Action.ENABLE, Action.MODPROBE) else (),
            self._moments(moments),
            tasks,
            error.tasks if isinstance(error, Stuck) else (),
            expected,
            contents,
        )

    def _warnings(self, step: Step, warned: int) -> Report:
        """What the kernel has warned of in the step: WARN_ON says that something is not as it must be."""
        new = self.kernel.machine.warnings[warned:]
        return Report(step.name, {WARNS: 1}, tuple(Finding(WARNS, each, step=step.name) for each in new))

    def _compared(
        self, step: Step, before: State | None, error: KlpemuError | None, subject: Subject
    ) -> Report:
        """The state now, compared with that before the step, and with that before anything was enabled."""
        restored, unchanged = [*self._restored_text.check(subject)], list[Finding | None]()
        if before is not None and isinstance(error, KernelErrno) and not isinstance(error, FtraceBug):
            after = state_of(subject)
            if after.transition == before.transition:
                unchanged += failures_leave_the_state_before(before, after)
        found = [replace(each, step=step.name) for each in restored + unchanged if each is not None]
        checks = {RESTORES: len(restored), UNCHANGED: len(unchanged)}
        return Report(step.name, checks, tuple(found))

    def _judge(self, step: Step, error: KlpemuError | None, expectations: Expectations) -> KlpemuError | None:
        """What stopped the guest without being expected; raises what is no finding at all."""
        whose = self._whose()
        if error is None or step.error:
            return None
        if isinstance(error, Stuck):
            expectations.fails(_STUCK[type(error)], str(error))
            return error if isinstance(error, Deadlock) else None
        if isinstance(error, GuestFault | FtraceBug):
            expectations.fails("the_guest_goes_on", whose + error.what)
        else:
            raise self._placed(step, error) from error
        return error

    def _call(self, step: Step) -> tuple[int, CallTrace | None]:
        assert step.call is not None
        kernel, values = self.kernel, step.call.values(self.kernel)
        kernel.machine.hub.instruction_budget = self._budget
        if step.action is Action.TRACE:
            trace = call_trace(kernel, step.call.function, values, att=self._att)
            return trace.returned, trace
        return kernel.call(step.call.function, *values), None

    def _load(self, step: Step) -> None:
        self.kernel.load_module(locate(step.target, self.scenario.base))

    def _unload(self, step: Step) -> None:
        self.kernel.unload_module(step.target)

    def _modprobe(self, step: Step) -> None:
        self.kernel.modprobe(locate(step.target, self.scenario.base), step.parameters)

    def _rmmod(self, step: Step) -> None:
        self.kernel.rmmod(step.target)

    def _enable(self, step: Step) -> None:
        patch = self.scenario.patches[step.target]
        if REGISTRATION in self.scenario.variants and registered(self.kernel, patch.name):
            enable(self.kernel, patch.name)
        elif patch.objects or patch.code is None:
            self.kernel.enable(patch)
        else:  # a livepatch module declares its functions itself, and its modinfo may name it otherwise
            self._names[step.target] = self.kernel.insmod(patch.code)

    def _register(self, step: Step) -> None:
        register(self.kernel, self.scenario.patches[step.target])

    def _unregister(self, step: Step) -> None:
        unregister(self.kernel, step.target)

    def _disable(self, step: Step) -> None:
        self.kernel.disable(self.name_of(step.target))

    def _reverse(self, step: Step) -> None:
        self.kernel.reverse(self.name_of(step.target))

    def _force(self, step: Step) -> None:
        self.kernel.force(self.name_of(step.target))

    def _spawn(self, step: Step) -> None:
        self._start(self.scenario.tasks[step.target])

    def _run(self, step: Step) -> None:
        assert step.msecs is not None
        self.kernel.tasks.run(step.msecs)

    def _write(self, step: Step) -> None:
        write(self.kernel, step)

    def _ftrace(self, step: Step) -> None:
        self._ftrace_users.register(step.target, step.functions)

    def _unftrace(self, step: Step) -> None:
        self._ftrace_users.unregister(step.target)

    def _wait(self, step: Step) -> None:
        self.kernel.tasks.wait_for_transition(within=step.msecs)

    _operations: Final[dict[Action, Callable[["StepRunner", Step], None]]] = {
        Action.REGISTER: _register,
        Action.UNREGISTER: _unregister,
        Action.LOAD: _load,
        Action.UNLOAD: _unload,
        Action.MODPROBE: _modprobe,
        Action.RMMOD: _rmmod,
        Action.ENABLE: _enable,
        Action.DISABLE: _disable,
        Action.REVERSE: _reverse,
        Action.FORCE: _force,
        Action.SPAWN: _spawn,
        Action.RUN: _run,
        Action.WAIT: _wait,
        Action.WRITE: _write,
        Action.FTRACE: _ftrace,
        Action.UNFTRACE: _unftrace,
    }

    # Tasks.

    def _start(self, task: DeclaredTask) -> None:
        for _ in range(task.count):
            try:
                self.kernel.tasks.spawn(
                    task.name, task.program, kthread=task.kthread, cpu=task.cpu, repeat=task.repeat
                )
            except KlpemuError as error:
                place = f"{self.scenario.path}:{task.line}: " if task.line else ""
                raise KlpemuError(str(error), where=f"{place}task '{task.name}'") from error

    def _let_decide(self) -> None:
        """Put the scenario's schedule in place, and the watch over it."""
        hub, scenario = self.kernel.machine.hub, self.scenario
        self.kernel.machine.sched.full_preemption = scenario.full_preemption
        if scenario.seed is not None:
            hub.schedule = Seeded(scenario.seed)
        elif scenario.schedule:
            hub.schedule = Explicit(scenario.schedule)
        elif scenario.tasks and isinstance(hub.schedule, RunToCompletion):
            hub.schedule = RoundRobin()
        if scenario.tasks:
            hub.schedule = WatchedSchedule(hub.schedule, self._watched)

    def _settle(self) -> None:
        """What somebody is in the middle of changing cannot be judged: let them come to an end."""
        if self.timeline is None:
            return
        machine = self.kernel.machine
        if not machine.run(lambda: is_settled(machine), SETTLING):
            at_work = [task for task in machine.tasks if task.activities and task.program is None]
            names = ", ".join(task.name for task in at_work)
            states = [self.kernel.tasks.state_of(task) for task in at_work]
            raise Stuck(
                f"no end of what {names or 'the kernel'} does in {SETTLING // HZ} virtual seconds", states
            )
        self._watched()

    def _watched(self) -> None:
        if self.timeline is not None:
            self.timeline.look()
            self.watch()

    def _moments(self, count: int) -> tuple[Moment, ...] | None:
        return None if self.timeline is None else tuple(self.timeline.since(count))

    def _tasks(self) -> TaskPicture | None:
        return None if self.timeline is None else task_picture(self.kernel, self.timeline)

    def judged(self) -> tuple[object, ...]:
        """What steps are judged by beside the kernel and its log: tasks, and how they have switched."""
        timeline = self.timeline
        return () if timeline is None else (timeline.tasks, timeline.how, timeline._version)

    def _whose(self) -> str:
        """The task whose program has failed since the last step: what a step calls itself is nobody's."""
        machine = self.kernel.machine
        new = [
            task
            for task in machine.tasks
            if task.program is not None and not task.activities and not task.dead and task not in self._failed
        ]
        self._failed.update(new)
        return "".join(f"{task.name}:{machine.pid_of(task)}: " for task in new)

    # What is shown.

    def _functions(self, step: Step) -> tuple[FunctionState, ...]:
        self._patched.update(dict.fromkeys(patched_functions(self.kernel)))
        if step.action is Action.CALL:
            return ()
        names = list(self._patched)
        if step.action is Action.TRACE and step.call is not None:
            names = [step.call.function]
        states = {
            name: function_state(self.kernel, name, att=self._att)
            for name in names
            if _stands(self.kernel, name)
        }
        before, self._functions_before = self._functions_before, self._functions_before | states
        if step.action in _LETS_TIME_GO_BY:
            return tuple(state for name, state in states.items() if before.get(name) != state)
        return tuple(states.values())

    def _not_loaded(self) -> tuple[str, ...]:
        objects = [name for each in self.kernel.enabled for name in each.patch.objects]
        loaded = {VMLINUX, *self.kernel.machine.modules.objects}
        return tuple(dict.fromkeys(name for name in objects if name not in loaded))

    def _placed(self, step: Step, error: KlpemuError) -> KlpemuError:
        """The error with the step, and the place in the scenario file if the step comes from one."""
        place = f"{self.scenario.path}:{step.line}: {step.name}" if step.line else step.name
        return KlpemuError(str(error), where=place)


def _stands(kernel: Kernel, function: str) -> bool:
    """Whether the function can be shown: its object is loaded and it has a site."""
    try:
        return has_site(kernel, function)
    except KlpemuError:
        return False

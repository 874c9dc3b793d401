"""Performing steps on a kernel and verifying after each: what `run`, `verify` and `demo` have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from elf.errors import KlpemuError
from emu.errno import KernelErrno
from emu.ftrace import FtraceBug
from emu.traps import GuestFault
from klpemu.call_trace import CallTrace, call_trace
from klpemu.fixtures import locate, shown
from klpemu.function_state import FunctionState, function_state, has_site, patched_functions
from klpemu.kernel import Kernel
from klpemu.scenario import Action, Scenario, Step
from patches.invariants.finding import Finding, Report
from patches.livepatch import VMLINUX

__all__ = ["StepResult", "StepRunner"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did: the checks after it, the lines it logged, and the functions it was about as they stand
    now.

    `returned` is RAX after a call, `trace` the executed stream of a traced one, `error` an expected error
    that came, `fault` what stopped the guest without being expected: then no further step makes sense.
    `not_loaded` are the objects whose functions an enabled patch will replace once they are loaded.
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


class StepRunner:
    """Boots the kernel of a scenario and performs steps on it, those of the scenario or others."""

    def __init__(self, scenario: Scenario, *, att: bool = False) -> None:
        self.scenario = scenario
        self.kernel = Kernel.load(scenario.kernel)
        self._att = att
        # The functions that were ever patched: their sites are shown to the end.
        self._patched: dict[str, None] = {}
        self._names: dict[str, str] = {}
        self._budget = scenario.budget or self.kernel.machine.hub.instruction_budget
        for module in scenario.modules:
            self.kernel.load_module(module)

    def boot(self) -> StepResult:
        """Verify the kernel before anything is done to it."""
        step = Step(Action.BOOT)
        return StepResult(step, self.kernel.verify(step.name), tuple(self.kernel.log))

    def perform(self, step: Step) -> StepResult:
        """Perform a step and verify; an error that it does not expect is raised, a guest's failure is not."""
        logged = len(self.kernel.log)
        error: KlpemuError | None = None
        fault: KlpemuError | None = None
        returned: int | None = None
        trace: CallTrace | None = None
        try:
            if step.call is not None:
                returned, trace = self._call(step)
            else:
                self._operations[step.action](self, step.target)
        except KlpemuError as caught:
            error = caught
        if error is not None and not step.error:
            if not isinstance(error, GuestFault | FtraceBug):
                raise self._placed(step, error)
            fault = error
        log = tuple(self.kernel.log[logged:])
        expectations = _Expectations(step)
        if fault is not None:
            expectations.fails("the_guest_goes_on", fault.what)
        expectations.compare(error, log, returned, trace)
        report = Report.merged([self.kernel.verify(step.name), expectations.report()], step.name)
        return StepResult(
            step,
            report,
            log,
            self._functions(step),
            returned,
            trace,
            shown(error) if error is not None and fault is None else "",
            fault,
            self._not_loaded() if step.action is Action.ENABLE else (),
        )

    def _call(self, step: Step) -> tuple[int, CallTrace | None]:
        assert step.call is not None
        kernel, values = self.kernel, step.call.values(self.kernel)
        kernel.machine.hub.instruction_budget = self._budget
        if step.action is Action.TRACE:
            trace = call_trace(kernel, step.call.function, values, att=self._att)
            return trace.returned, trace
        return kernel.call(step.call.function, *values), None

    def _load(self, name: str) -> None:
        self.kernel.load_module(locate(name, self.scenario.base))

    def _unload(self, name: str) -> None:
        self.kernel.unload_module(name)

    def _enable(self, name: str) -> None:
        patch = self.scenario.patches[name]
        if patch.objects or patch.code is None:
            self.kernel.enable(patch)
        else:  # a livepatch module declares its functions itself, and its modinfo may name it otherwise
            self._names[name] = self.kernel.insmod(patch.code)

    def _disable(self, name: str) -> None:
        self.kernel.disable(self._names.get(name, name))

    _operations: Final[dict[Action, Callable[["StepRunner", str], None]]] = {
        Action.LOAD: _load,
        Action.UNLOAD: _unload,
        Action.ENABLE: _enable,
        Action.DISABLE: _disable,
    }

    def _functions(self, step: Step) -> tuple[FunctionState, ...]:
        self._patched.update(dict.fromkeys(patched_functions(self.kernel)))
        if step.action is Action.CALL:
            return ()
        names = list(self._patched)
        if step.action is Action.TRACE and step.call is not None:
            names = [step.call.function] if _stands(self.kernel, step.call.function) else []
        return tuple(
            function_state(self.kernel, name, att=self._att) for name in names if _stands(self.kernel, name)
        )

    def _not_loaded(self) -> tuple[str, ...]:
        objects = [name for each in self.kernel.enabled for name in each.patch.objects]
        loaded = {VMLINUX, *self.kernel.machine.modules.objects}
        return tuple(dict.fromkeys(name for name in objects if name not in loaded))

    def _placed(self, step: Step, error: KlpemuError) -> KlpemuError:
        """The error with the step, and the place in the scenario file if the step comes from one."""
        place = f"{self.scenario.path}:{step.line}: {step.name}" if step.line else step.name
        return KlpemuError(str(error), where=place)


class _Expectations:
    """Compares what a step did with what its scenario says; each comparison counts as a check."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._checks: dict[str, int] = {}
        self._findings: list[Finding] = []

    def fails(self, invariant: str, what: str) -> None:
        self._findings.append(Finding(invariant, what, step=self._step.name))

    def compare(
        self, error: KlpemuError | None, log: tuple[str, ...], returned: int | None, trace: CallTrace | None
    ) -> None:
        step = self._step
        if step.error:
            found = "nothing failed" if error is None else shown(error)
            self._check("error_is_the_expected_one", _is_expected(error, step.error), found, step.error)
        if step.log is not None:
            self._check("log_is_the_expected_one", step.log == log, list(log), list(step.log))
        if error is not None:
            return
        if step.returns is not None and returned is not None:
            same = (step.returns - returned) % (1 << 64) == 0
            self._check("call_returns_the_expected_value", same, f"{returned} ({returned:#x})", step.returns)
        if step.through is not None and trace is not None:
            self._check(
                "call_passes_the_expected_functions",
                step.through == trace.functions,
                list(trace.functions),
                list(step.through),
            )
        if step.executed is not None and trace is not None:
            executed = len(trace.instructions)
            self._check("call_executes_as_many", step.executed == executed, executed, step.executed)

    def report(self) -> Report:
        return Report(self._step.name, self._checks, tuple(self._findings))

    def _check(self, invariant: str, holds: bool, found: object, expected: object) -> None:
        if holds:
            self._checks[invariant] = self._checks.get(invariant, 0) + 1
        else:
            self.fails(invariant, f"found {found}, expected {expected}")


def _is_expected(error: KlpemuError | None, wanted: str) -> bool:
    if error is None:
        return False
    return (isinstance(error, KernelErrno) and error.name == wanted) or (
        wanted in str(error) and not wanted.isupper()
    )


def _stands(kernel: Kernel, function: str) -> bool:
    """Whether the function can be shown: its object is loaded and it has a site."""
    try:
        return has_site(kernel, function)
    except KlpemuError:
        return False

"""What steps, functions, traces and findings look like: as lines of text, and as parts of the JSON object.

What comes of tasks is in klpemu/task_report.py.
"""

import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn

from elf.errors import KlpemuError
from emu.traps import GuestFault
from klpemu.call_trace import CallTrace, Visit
from klpemu.fixtures import shown
from klpemu.function_state import FunctionState
from klpemu.output import Output
from klpemu.scenario import Action
from klpemu.step_runner import StepResult
from klpemu.task_report import moment_object, print_in_the_way, task_object
from patches.invariants.finding import Finding, Report

__all__ = [
    "FINDINGS",
    "conclude",
    "fault_object",
    "finding_object",
    "print_findings",
    "print_function",
    "print_outcome",
    "print_step",
    "print_trace",
    "print_verdict",
    "step_object",
    "trace_object",
    "verdict_object",
]

# Exit status; 0 says that all holds, 2 (raised as KlpemuError or by click) that usage or input is bad.
FINDINGS: Final = 1
CODE_COLUMN = 27  # nine bytes of machine code


def print_step(output: Output, result: StepResult) -> None:
    """One step with its log lines, the patched functions as they are now, and the checks."""
    returned = f" = {_number(result.returned)}" if result.returned is not None else ""
    output.line((result.step.name, "bold"), returned, hang=4)
    for line in result.log:
        output.line((line, "dim"), indent=2)
    print_outcome(output, result)


def print_outcome(output: Output, result: StepResult) -> None:
    """What a step came to, behind what it has logged: functions, findings, checks."""
    step = result.step
    if result.error:
        output.line(("given up: " if result.in_the_way else "refused: ", "yellow"), result.error, indent=2)
    if result.trace is not None:
        output.line(*_route(result.trace), indent=2)
    for line in result.contents or ():
        output.line(line.replace("\t", " "), indent=2, hang=4)
    if step.action not in (Action.CALL, Action.TRACE):
        for function in result.functions:
            output.line(function.place, "  ", _code(function.code), "  ", function.text, indent=2, hang=4)
    for name in result.not_loaded:
        output.line((f"object {name} is not loaded: nothing of it is patched yet", "yellow"), indent=2)
    for finding in result.expected:
        output.line(("expected: ", "yellow"), str(finding), indent=2)
    print_findings(output, result.report)
    print_in_the_way(output, result.in_the_way)
    if result.report.holds:
        output.line((f"{result.report.total} checks hold", "green"), indent=2)


def print_function(output: Output, function: FunctionState) -> None:
    """One function's site, func_stack and line in enabled_functions, each as a fact."""
    output.fact("site", function.place)
    output.fact("", _code(function.code), "  ", function.text)
    output.fact("func_stack", *([_stack(function.func_stack)] if function.func_stack else [("empty", "dim")]))
    listed = function.enabled_functions.replace("\t", " ")
    output.fact("enabled_functions", *([listed] if listed else [("not listed", "dim")]))


def print_trace(output: Output, trace: CallTrace) -> None:
    """Every executed instruction, function by function."""
    for visit in trace.visits:
        _print_visit(output, visit)
    output.line()
    output.line(*_route(trace))
    output.line(f"{len(trace.instructions)} instructions executed, returned {_number(trace.returned)}")


def print_findings(output: Output, report: Report) -> None:
    """Each finding with its bytes, expected and found."""
    for finding in report.findings:
        output.line((str(finding), "red"), indent=2)
        for line in finding.details():
            output.line(line, indent=2, hang=11)


def print_verdict(output: Output, reports: Sequence[Report]) -> None:
    """The last line: all checks hold, or how many findings there are."""
    total = Report.merged(reports)
    output.line()
    if total.holds:
        output.line((f"all {total.total} checks hold", "bold green"))
    else:
        count = len(total.findings)
        output.line((f"{count} finding{'s' if count > 1 else ''}; {total.total} checks made", "bold red"))


def verdict_object(reports: Sequence[Report]) -> dict[str, Any]:
    """`holds`, the number of `checks`, and the `findings` of all steps."""
    total = Report.merged(reports)
    return {
        "holds": total.holds,
        "checks": total.total,
        "findings": [finding_object(each) for each in total.findings],
    }


def step_object(result: StepResult) -> dict[str, Any]:
    """One step; keys that do not apply to it are null."""
    picture = result.tasks
    return {
        "step": result.step.name,
        "action": result.step.action.value,
        "stage": result.step.stage or None,
        "line": result.step.line or None,
        "holds": result.report.holds,
        "checks": result.report.checks,
        "findings": [finding_object(each) for each in result.report.findings],
        "log": list(result.log),
        "functions": [_function_object(each) for each in result.functions],
        "not_loaded": list(result.not_loaded),
        "returned": result.returned,
        "contents": None if result.contents is None else list(result.contents),
        "trace": trace_object(result.trace) if result.trace is not None else None,
        "error": result.error or None,
        "fault": fault_object(result.fault) if result.fault is not None else None,
        "expected": [finding_object(each) for each in result.expected],
        "seconds": picture.seconds if picture is not None else None,
        "transition": picture.transition or None if picture is not None else None,
        "timeline": [moment_object(each) for each in result.timeline]
        if result.timeline is not None
        else None,
        "tasks": [task_object(each, picture) for each in picture.states] if picture is not None else None,
        "in_the_way": [task_object(each) for each in result.in_the_way],
    }


def trace_object(trace: CallTrace) -> dict[str, Any]:
    """A traced call."""
    return {
        "functions": list(trace.functions),
        "executed": len(trace.instructions),
        "returned": trace.returned,
        "instructions": [
            {
                "address": f"{each.instruction.address:#x}",
                "place": each.place,
                "bytes": each.instruction.code.hex(),
                "text": str(each.instruction),
                "comment": each.comment,
            }
            for each in trace.instructions
        ],
    }


def fault_object(fault: KlpemuError) -> dict[str, Any]:
    """What stopped the guest; registers as hexadecimal strings."""
    if not isinstance(fault, GuestFault):
        return {"error": shown(fault), "address": None, "registers": {}, "last": []}
    return {
        "error": shown(fault),
        "address": f"{fault.address:#x}",
        "registers": {name: f"{value:#x}" for name, value in fault.registers.items()},
        "last": [line.strip() for line in fault.last],
    }


def _print_visit(output: Output, visit: Visit) -> None:
    name = visit.instructions[0].place.partition("+")[0]
    _, _, module = visit.instructions[0].place.partition(" ")
    output.line()
    heading = f"{name} {module}".rstrip()
    output.line((heading, "bold cyan"), f"  # {visit.role}" if visit.role else "")
    for each in visit.instructions:
        offset = each.place.partition("+")[2].partition("/")[0]
        comment = f"  # {each.comment}" if each.comment else ""
        text = f"{each.instruction}"
        code = "" if output.narrow else f"{_code(each.instruction.code):<{CODE_COLUMN}} "
        output.line(code, text, (comment, "green"), label=f"+{offset:<7}", indent=2)


def _route(trace: CallTrace) -> list[str | tuple[str, str]]:
    pieces: list[str | tuple[str, str]] = []
    for name in trace.functions:
        pieces += [(" -> ", "dim"), (name, "cyan")] if pieces else [(name, "cyan")]
    return pieces


def _code(code: bytes) -> str:
    return code.hex(" ")


def _stack(stack: Sequence[str]) -> str:
    return ", ".join(stack)


def _number(value: int) -> str:
    return f"{value} ({value:#x})"


def _function_object(function: FunctionState) -> dict[str, Any]:
    return {
        "function": function.function,
        "place": function.place,
        "site": f"{function.site:#x}",
        "bytes": function.code.hex(),
        "text": function.text,
        "func_stack": list(function.func_stack),
        "enabled_functions": function.enabled_functions or None,
    }


def finding_object(finding: Finding) -> dict[str, Any]:
    """A finding as a part of the JSON object."""
    return {
        "step": finding.step,
        "invariant": finding.invariant,
        "what": finding.what,
        "address": f"{finding.address:#x}" if finding.address else None,
        "symbol": finding.symbol or None,
        "expected": finding.expected.hex() or None,
        "found": finding.found.hex() or None,
        "details": finding.details(),
    }


def conclude(output: Output, results: Sequence[StepResult]) -> NoReturn:
    """The verdict on all steps, the JSON object if it is wanted, and the end of the program."""
    reports = [each.report for each in results]
    print_verdict(output, reports)
    output.finish({**verdict_object(reports), "steps": [step_object(each) for each in results]})
    sys.exit(0 if all(each.holds for each in reports) else FINDINGS)

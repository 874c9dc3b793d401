"""A scenario's steps on the screen: those of a scenario with tasks as they go, others when they are done."""

from functools import partial

from rich.console import RenderableType

from elf.errors import KlpemuError
from klpemu.file_steps import LOOKS
from klpemu.output import Output
from klpemu.report import print_outcome, print_step
from klpemu.scenario import Step
from klpemu.step_runner import StepResult, StepRunner
from klpemu.task_report import print_moments, print_tasks
from klpemu.task_table import task_picture
from klpemu.timeline import Timeline

__all__ = ["ScenarioDisplay"]


class ScenarioDisplay:
    """Performs the steps of a scenario, and prints each."""

    def __init__(self, output: Output, runner: StepRunner) -> None:
        self._output = output
        self._runner = runner
        self._shown = 0

    def boot(self) -> StepResult:
        """Verify and print the kernel as it is before the first step."""
        result = self._runner.boot()
        print_step(self._output, result)
        return result

    def perform(self, step: Step) -> StepResult:
        """Perform and print one step."""
        if step.stage:
            self._output.heading(step.stage)
        if step.note:
            self._output.line(step.note, hang=0)
        if self._runner.timeline is not None:
            return self._follow(step, self._runner.timeline)
        result = self._runner.perform(step)
        print_step(self._output, result)
        return result

    def _follow(self, step: Step, timeline: Timeline) -> StepResult:
        """Perform a step among tasks: what happens is printed as it happens, and below it how they stand."""
        output, runner = self._output, self._runner
        output.line((step.name, "bold"), hang=4)

        def draw() -> RenderableType:
            return task_picture(runner.kernel, timeline).drawing(narrow=output.narrow)

        def print_new() -> None:
            moments = timeline.moments[self._shown :]
            if moments:
                self._shown += len(moments)
                print_moments(output, moments)

        with output.picture(draw) as renew:
            runner.watch = partial(renew, print_new)
            try:
                result = runner.perform(step)
            except KlpemuError:
                print_new()  # what went before is a part of the story
                raise
            finally:
                runner.watch = lambda: None
            print_new()
        if result.tasks is not None and not output.draws and step.action not in LOOKS:
            print_tasks(output, result.tasks)
        if result.returned is not None:
            output.line(f"returned {result.returned} ({result.returned:#x})", indent=2)
        print_outcome(output, result)
        return result

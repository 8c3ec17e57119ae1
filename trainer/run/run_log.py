"""Records that a run writes, and the console line of a step."""

import logging
import math
from collections.abc import Sequence

from headrace.schemas.train.run_config import CheckpointConfig
from headrace.schemas.train.run_state import RunState
from headrace.trainer.export.export import export
from headrace.trainer.optim.states import averaged
from headrace.trainer.parallel import RankLayout
from headrace.trainer.run.cadence import Cadence
from headrace.trainer.run.console_line import console_line
from headrace.trainer.run.evaluation import evaluate
from headrace.trainer.run.session import Session
from headrace.trainer.run.step_report import Report
from headrace.trainer.run.unreported_steps import DoneStep
from headrace.trainer.shards.quarantine import describe, merge, write_quarantine

logger = logging.getLogger(__name__)


def write_steps(steps: Sequence[DoneStep], session: Session, state: RunState) -> None:
    """Write steps to the files and the console, at the first rank."""
    if session.log is None:
        return
    for step in steps:
        metrics = step.metrics()
        session.log.write(metrics)
        left = seconds_left(session, state)
        logger.info("%s", console_line(metrics, session.total_steps, left))


def seconds_left(session: Session, state: RunState) -> float:
    """Until the last step, at the mean pace of this process."""
    start = session.state
    pace = (state.seconds - start.seconds) / (state.step - start.step)
    return (session.total_steps - state.step) * pace


def write_result(
    config: CheckpointConfig, session: Session, layout: RankLayout, state: RunState
) -> str:
    """Export what was trained, if the config wants it; says where it lies."""
    if not config.at_end:
        return "nothing"
    with averaged(session.optimizer, session.built.trained):
        result = export(
            session.built,
            layout,
            session.model,
            session.run_directory,
            state.step,
            node_local=config.node_local,
            save_dtype=config.save_dtype,
        )
    return str(result)


def note_quarantined(state: RunState, reports: Sequence[Report], session: Session) -> RunState:
    """The state with the row groups that any rank has given up; written down by the first rank."""
    found = [record for report in reports for record in report.quarantined]
    records = merge(state.quarantined, found)
    if len(records) == len(state.quarantined):
        return state
    if session.log is not None:
        write_quarantine(session.run_directory, records)
        for record in records:
            if record not in state.quarantined:
                logger.warning("quarantined: %s", describe(record))
    return state.model_copy(update={"quarantined": records})


def run_evaluation(session: Session, layout: RankLayout, state: RunState) -> RunState:
    """Evaluate and write the results down; the state then knows the loss over all sets."""
    with averaged(session.optimizer, session.built.trained):
        results = evaluate(session.evaluation_sets, session.engine, layout, state.step)
        answers = [] if session.prompted is None else session.prompted.answer()
    if session.log is not None and answers:
        session.log.write_answers(state.step, answers)
    for result in results:
        if session.log is not None:
            session.log.write(result)
        logger.info(
            "evaluation %s after step %d: loss %.4f%s over %s tokens in %.1f s",
            result.name,
            state.step,
            result.loss,
            "" if result.pairs is None else f", accuracy {result.pairs.accuracy:.0%}",
            f"{result.trained_tokens:,}",
            result.seconds,
        )
    weight = sum(result.weight for result in results)
    if not weight:
        return state
    loss = math.fsum(result.loss * result.weight for result in results) / weight
    return state.after_evaluation(loss)


def ending(cadence: Cadence, state: RunState) -> str:
    """Describe the end of a run."""
    early = f" early, after step {state.step}" if cadence.is_out_of_patience(state) else ""
    if state.best_loss is None:
        return early
    return f"{early}; lowest evaluation loss {state.best_loss:.4f} after step {state.best_step}"

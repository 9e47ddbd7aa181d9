"""What a rank does for each command."""

from expertlane.engine import commands
from expertlane.engine.measure.operations import measure_launches, measure_operations, pin_to_core
from expertlane.engine.measure.rates import measure_rates
from expertlane.engine.measure.transfers import measure_contention, measure_transfers
from expertlane.engine.rank_machine import describe
from expertlane.engine.stage import (
    deploy,
    discard_steps,
    finish_moves,
    run_step,
    set_dispatch,
    start_moves,
    time_one_move,
)
from expertlane.engine.worker import Handlers

HANDLERS: Handlers = {
    commands.DescribeMachine: describe,
    commands.Deploy: deploy,
    commands.SetDispatch: set_dispatch,
    commands.RunStep: run_step,
    commands.DiscardSteps: discard_steps,
    commands.StartMoves: start_moves,
    commands.FinishMoves: finish_moves,
    commands.TimeOneMove: time_one_move,
    commands.MeasureRates: measure_rates,
    commands.PinToCore: pin_to_core,
    commands.MeasureOperations: measure_operations,
    commands.MeasureLaunches: measure_launches,
    commands.MeasureTransfers: measure_transfers,
    commands.MeasureContention: measure_contention,
}

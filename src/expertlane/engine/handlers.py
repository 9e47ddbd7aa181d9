"""What a rank does for each command."""

from expertlane.engine import commands
from expertlane.engine.deployed_stage import deploy, run_step, set_dispatch
from expertlane.engine.measure.machine import describe_machine, measure_rates
from expertlane.engine.measure.operations import measure_launches, measure_operations, pin_to_core
from expertlane.engine.measure.transfers import measure_contention, measure_transfers
from expertlane.engine.migration import apply_placements, finish_moves, start_moves, time_one_move
from expertlane.engine.worker import Handlers

HANDLERS: Handlers = {
    commands.DescribeMachine: describe_machine,
    commands.Deploy: deploy,
    commands.SetDispatch: set_dispatch,
    commands.RunStep: run_step,
    commands.StartMoves: start_moves,
    commands.FinishMoves: finish_moves,
    commands.ApplyPlacements: apply_placements,
    commands.TimeOneMove: time_one_move,
    commands.MeasureRates: measure_rates,
    commands.PinToCore: pin_to_core,
    commands.MeasureOperations: measure_operations,
    commands.MeasureLaunches: measure_launches,
    commands.MeasureTransfers: measure_transfers,
    commands.MeasureContention: measure_contention,
}

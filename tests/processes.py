"""Functions run by several processes at once, set up as `accelerate launch --config_file` sets them up."""

from __future__ import annotations

import datetime
import io
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils.launch import prepare_multi_gpu_env


CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate"


def run_processes(
    config: str, function: Callable[..., Any], *args: Any, timeout: float = 60.0, **kwargs: Any
) -> list[Any]:
    """
    What `function(*args, **kwargs)` returns in each process of an accelerate configuration.

    The processes are forked, so that they need not import anything anew; what they return is pickled.

    Args:
        config: name of a file in `examples/accelerate`.
        timeout: seconds after which processes that still run are killed, and the test fails.
    """
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(CONFIGS / f"{config}.yaml"), "--main_process_port", str(_free_port()), "script.py"]
    )
    arguments, _, _ = _validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(arguments.main_process_port)}
    environment |= {"WORLD_SIZE": str(arguments.num_processes), "LOCAL_WORLD_SIZE": str(arguments.num_processes)}
    context = multiprocessing.get_context("fork")
    ends = [context.Pipe(duplex=False) for _ in range(arguments.num_processes)]
    processes = [
        context.Process(target=_run, args=(rank, environment, sender, partial(function, *args, **kwargs)))
        for rank, (_, sender) in enumerate(ends)
    ]
    try:
        for process in processes:
            process.start()
        for _, sender in ends:
            sender.close()
        return _collect(processes, [receiver for receiver, _ in ends], timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(processes: list, receivers: list, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(enumerate(receivers))
    end = datetime.datetime.now() + datetime.timedelta(seconds=timeout)
    while waiting:
        left = (end - datetime.datetime.now()).total_seconds()
        ready = multiprocessing.connection.wait(waiting.values(), timeout=max(left, 0))
        if not ready:
            raise TimeoutError(f"Processes {sorted(waiting)} hang: nothing came back within {timeout} seconds.")
        for rank in [rank for rank, receiver in waiting.items() if receiver in ready]:
            try:
                message = waiting.pop(rank).recv_bytes()
            except EOFError:
                raise RuntimeError(f"Process {rank} died.") from None
            error, results[rank] = torch.load(io.BytesIO(message), weights_only=False)
            if error is not None:
                raise RuntimeError(f"Process {rank} failed:\n{error}")
    return [results[rank] for rank in range(len(processes))]


def _run(rank: int, environment: dict[str, str], sender: Any, function: Callable[[], Any]) -> None:
    os.environ |= {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    torch.set_num_threads(1)
    try:
        result = (None, function())
    except BaseException:
        result = (traceback.format_exc(), None)
    message = io.BytesIO()
    torch.save(result, message)  # whole: a tensor sent by itself would stay in this process's memory
    sender.send_bytes(message.getvalue())
    sender.close()
    sys.stdout.flush()
    # Not through the interpreter's end: the other process may be waiting for this one in a collective call.
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

"""Several nodes, as groups of processes on one machine: they train as one, and the loss of one ends the others."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import (
    TIMEOUT,
    assert_close_curves,
    await_exit,
    commands,
    descendants,
    fork,
    free_port,
    kill_process,
    live_processes,
    read_log,
    saved_step,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")]
REPOSITORY = Path(__file__).parents[2]
STEPS = 60
AGAIN = "start the same command again on every node"


@pytest.fixture
def recipe(make_shards, write_recipe) -> Path:
    return write_recipe(
        make_shards(),
        trainer={"max_steps": STEPS},
        model={"config": {"block_size": 16, "vocab_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 16}},
        data={"order": "shuffled"},
        validation={"every_n_steps": 20},
        checkpoint={"every_n_steps": 10},
    )


def _two_nodes(launcher: str, program: list[str], devices: int = 1) -> tuple[list[list[str]], list[dict[str, str]]]:
    """The command line of each of two nodes, and its environment."""
    port, n = str(free_port()), str(devices)
    program = ["-m", "gpt2_lightning", *program, "--trainer.devices", n, "--trainer.num_nodes", "2"]
    if launcher == "lightning":
        same = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [program, program], [same | {"NODE_RANK": str(rank)} for rank in (0, 1)]
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", n, "--rdzv_backend", "c10d"]
    torchrun += ["--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "X"]
    return [torchrun + program] * 2, [{}, {}]


def _rendezvous_host(nodes: list["subprocess.Popen[bytes]"], port: str) -> int:
    """Which of two agents listens at the endpoint: on one machine the one that came first."""
    inodes = {
        fields[9]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for fields in map(str.split, Path(table).read_text().splitlines()[1:])
        if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == int(port)
    }
    sockets = {f"socket:[{inode}]" for inode in inodes}
    (host,) = [
        i
        for i, node in enumerate(nodes)
        if any(os.readlink(fd) in sockets for fd in Path(f"/proc/{node.pid}/fd").iterdir())
    ]
    return host


def test_two_nodes_of_two_processes_under_torchrun_train_as_one_process(recipe, read_scalars, tmp_path):
    output, alone, run = (tmp_path / name for name in ("output.txt", "alone", "run"))
    command = ["fit", "--config", str(recipe), "--trainer.max_steps", "4", "--validation.every_n_steps", "2"]
    assert await_exit(fork([*command, "--run_dir", str(alone)], output)) == 0, output.read_text()
    command += ["--run_dir", str(run), "--trainer.strategy", "ddp", "--data.micro_batch_size", "1"]
    lines, environments = _two_nodes("torchrun", command, devices=2)
    with commands(output, *lines, environments=environments) as nodes:
        for node in nodes:
            assert node.wait(TIMEOUT) == 0, output.read_text()[-5000:]
    assert_close_curves(run, alone, read_scalars, 4)


@pytest.mark.parametrize(("launcher", "dies"), [("torchrun", "the host of the rendezvous"), ("lightning", "node 1")])
def test_a_node_that_dies_ends_the_other_and_both_resume(launcher, dies, recipe, read_scalars, tmp_path):
    output, alone, run = (tmp_path / name for name in ("output.txt", "alone", "run"))
    command = ["fit", "--config", str(recipe)]
    assert await_exit(fork([*command, "--run_dir", str(alone)], output)) == 0, output.read_text()
    output.write_text("")
    command += ["--trainer.strategy", "ddp"]
    lines, environments = _two_nodes(launcher, command)
    with commands(output, *lines, environments=environments) as nodes:
        wait_until(lambda: len(read_log(run)) > 15, lambda: nodes[0].poll() is None, output)
        doomed = 1 if dies == "node 1" else _rendezvous_host(nodes, lines[0][9].rpartition(":")[2])
        processes = [[node.pid, *descendants(node.pid)] for node in nodes]
        for pid in processes[doomed]:
            os.kill(pid, signal.SIGKILL)
        assert nodes[1 - doomed].wait(60) != 0
        assert not live_processes().keys() & set(processes[1 - doomed])
    said = output.read_text()
    assert said.count("gpt2 fit: error: ") == 1, said
    assert AGAIN in said
    lines, environments = _two_nodes(launcher, command)
    with commands(output, *lines, environments=environments) as nodes:
        for node in nodes:
            assert node.wait(TIMEOUT) == 0, output.read_text()[-3000:]
    assert "resuming from" in output.read_text()
    assert_close_curves(run, alone, read_scalars, STEPS)


def test_a_node_that_hangs_ends_the_others_after_the_timeout(recipe, tmp_path):
    output, run = tmp_path / "output.txt", tmp_path / "run"
    timeout = ["--trainer.strategy", "DDPStrategy", "--trainer.strategy.timeout", "00:00:15"]
    lines, environments = _two_nodes("lightning", ["fit", "--config", str(recipe), *timeout])
    with commands(output, *lines, environments=environments) as nodes:
        wait_until(lambda: len(read_log(run)) > 10, lambda: nodes[0].poll() is None, output)
        nodes[1].send_signal(signal.SIGSTOP)
        assert nodes[0].wait(60) == 1
    said = output.read_text()
    assert said.count("gpt2 fit: error: ") == 1, said
    assert AGAIN in said


def test_a_node_that_finds_no_other_prints_where_it_waited(recipe, tmp_path):
    output, ports = tmp_path / "output.txt", [str(free_port()) for _ in range(2)]
    timeout = ["--trainer.strategy", "DDPStrategy", "--trainer.strategy.timeout", "00:00:01"]
    program = ["-m", "gpt2_lightning", "fit", "--config", str(recipe), "--trainer.num_nodes", "2", *timeout]
    environments = [
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": str(rank)} for rank, port in enumerate(ports)
    ]
    lines = [[*program, "--run_dir", str(tmp_path / port)] for port in ports]  # each has a job of its own
    with commands(output, *lines, environments=environments) as nodes:
        assert [node.wait(60) for node in nodes] == [1, 1]
    said = output.read_text()
    for rank, port in enumerate(ports):
        assert any(f"node {rank} of 2" in line and f"127.0.0.1:{port}" in line for line in said.splitlines()), said
    errors = [line for line in said.splitlines() if line.startswith("gpt2 fit: error: ")]
    assert len(errors) == 2, said
    assert all("MASTER_ADDR" in line for line in errors), said


SRUN = """
import os, signal, subprocess, sys

command = sys.argv[sys.argv.index("gpt2") :]
environments = [os.environ | {"SLURM_PROCID": n, "SLURM_NODEID": n, "SLURM_LOCALID": "0"} for n in "01"]
tasks = [subprocess.Popen(command, env=environment) for environment in environments]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""


def test_the_slurm_template_is_requeued_until_its_run_is_done(recipe, read_scalars, tmp_path):
    """With stand-ins for SLURM's commands and variables: two tasks, each on a node of its own."""
    bin_dir, asked, output, run = (tmp_path / name for name in ("bin", "asked", "output.txt", "run"))
    scripts = {
        "srun": f"#!{sys.executable}\n{SRUN}",
        "scontrol": f'#!/bin/sh\necho "$@" >> {asked}\n',
        "gpt2": f'#!/bin/sh\nexec {sys.executable} -m gpt2_lightning "$@"\n',
    }
    bin_dir.mkdir()
    for name, text in scripts.items():
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    slurm = {"JOB_ID": "4242", "NNODES": "2", "NTASKS": "2", "NTASKS_PER_NODE": "1", "JOB_NAME": "gpt2_124m"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    # Lightning would take the port from the job's number, which may be in use here
    environment |= {"SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{bin_dir}:{os.environ['PATH']}"}
    steps = 400
    flags = ["--config", str(recipe), "--trainer.max_steps", str(steps), "--checkpoint.every_n_steps", "1000"]
    flags += ["--model.lr_scheduler.max_steps", str(steps)]
    here = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--model.compile", "false"]
    template = ["bash", str(REPOSITORY / "configs/slurm/gpt2_124m.sbatch"), *flags, *here, "--run_dir", str(run)]

    def start() -> "subprocess.Popen[bytes]":
        with output.open("ab") as file:
            return subprocess.Popen(template, cwd=REPOSITORY, env=os.environ | environment, stdout=file, stderr=file)

    job = start()
    try:
        wait_until(lambda: len(read_log(run)) > 10, lambda: job.poll() is None, output)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(60) == 128 + signal.SIGUSR1, output.read_text()
        assert asked.read_text() == "requeue 4242\n"
        stopped = saved_step(run)
        assert 0 < stopped < steps
        template += ["--trainer.max_steps", str(stopped + 5)]
        job = start()
        assert job.wait(TIMEOUT) == 0, output.read_text()
    finally:
        for pid in [*descendants(job.pid), job.pid]:
            kill_process(pid)
        job.wait()
    assert f"last.ckpt at step {stopped}" in output.read_text()
    assert asked.read_text() == "requeue 4242\n"
    alone = tmp_path / "alone"
    whole = ["fit", *flags, "--trainer.max_steps", str(stopped + 5), "--run_dir", str(alone)]
    assert await_exit(fork(whole, output)) == 0, output.read_text()
    assert_close_curves(run, alone, read_scalars, stopped + 5)

"""Several nodes, as process groups on one machine: they train as one, and none outlives the loss of another unheard."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import (
    PATIENCE,
    assert_close_curves,
    await_exit,
    commands,
    descendants,
    fork,
    free_port,
    kill_process,
    live_processes,
    read_log,
    wait_until,
)

from gpt2_lightning.__main__ import main

REPOSITORY = Path(__file__).parents[2]
STEPS = 60

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")


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


def _two_nodes(launcher: str, program: list[str]) -> tuple[list[list[str]], list[dict[str, str]]]:
    """The command line of each of two nodes of one process, and its environment."""
    port = str(free_port())
    program = ["-m", "gpt2_lightning", *program, "--trainer.devices", "1", "--trainer.num_nodes", "2"]
    if launcher == "lightning":
        alike = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [program, program], [alike | {"NODE_RANK": str(rank)} for rank in (0, 1)]
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d"]
    torchrun += ["--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "X"]
    return [torchrun + program] * 2, [{}, {}]


def _rendezvous_host(nodes: list["subprocess.Popen[bytes]"], port: str) -> int:
    """Which of two agents listens at the endpoint: on one machine it is the one that came first."""
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


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "lightning"])
def test_a_node_that_goes_away_ends_the_other_and_both_go_on(launcher, recipe, read_scalars, tmp_path):
    alone, output, run = tmp_path / "alone", tmp_path / "output.txt", tmp_path / "run"
    command = ["fit", "--config", str(recipe)]
    assert await_exit(fork([*command, "--run_dir", str(alone)], output)) == 0, output.read_text()
    for doomed_hosts in (False, True):  # the node at whose address the others met, and one that they do without
        output.write_text("")
        before = len(read_log(run))
        lines, environments = _two_nodes(launcher, [*command, "--trainer.strategy", "ddp"])
        with commands(output, *lines, environments=environments) as nodes:
            wait_until(lambda: len(read_log(run)) > before + 15, lambda: nodes[0].poll() is None, output)  # noqa: B023
            host = 0 if launcher == "lightning" else _rendezvous_host(nodes, lines[0][9].rpartition(":")[2])
            doomed, other = (nodes[host], nodes[1 - host]) if doomed_hosts else (nodes[1 - host], nodes[host])
            processes = {node: [node.pid, *descendants(node.pid)] for node in nodes}
            for pid in processes[doomed]:
                os.kill(pid, signal.SIGKILL)
            killed_at = time.monotonic()
            assert other.wait(60) not in (0, None)
            print(f"{launcher}: the other node ended after {time.monotonic() - killed_at:.1f} s")
            assert not live_processes().keys() & set(processes[other])
        said = output.read_text()
        assert said.count("gpt2 fit: error: ") == 1, said
        assert said.count("gpt2 fit: error: lost another process of this job (") == 1, said
        assert ": see what it said, and start the same command again on every node" in said
    lines, environments = _two_nodes(launcher, [*command, "--trainer.strategy", "ddp"])
    with commands(output, *lines, environments=environments) as nodes:
        for node in nodes:
            assert node.wait(PATIENCE) == 0, output.read_text()[-3000:]
    assert "resuming from" in output.read_text()
    assert len(list(run.glob("config*.yaml"))) == 3
    assert_close_curves(run, alone, read_scalars, STEPS)


@on_linux
@pytest.mark.slow
def test_a_node_that_hangs_is_given_up_after_the_timeout(recipe, tmp_path):
    output, run = tmp_path / "output.txt", tmp_path / "run"
    patience = ["--trainer.strategy", "DDPStrategy", "--trainer.strategy.timeout", "00:00:15"]
    lines, environments = _two_nodes("lightning", ["fit", "--config", str(recipe), *patience])
    with commands(output, *lines, environments=environments) as nodes:
        wait_until(lambda: len(read_log(run)) > 10, lambda: nodes[0].poll() is None, output)
        nodes[1].send_signal(signal.SIGSTOP)
        assert nodes[0].wait(60) == 1
    said = output.read_text()
    assert "gpt2 fit: error: another process of this job hangs (Timed out waiting 15000ms for recv" in said, said
    assert "start the same command again on every node" in said


@on_linux
@pytest.mark.slow
def test_a_node_that_finds_no_other_says_where_it_waited(recipe, tmp_path):
    output, ports = tmp_path / "output.txt", [str(free_port()) for _ in range(3)]
    patience = ["--trainer.strategy", "DDPStrategy", "--trainer.strategy.timeout", "00:00:01"]
    program = ["-m", "gpt2_lightning", "fit", "--config", str(recipe), "--trainer.num_nodes", "2", *patience]
    environments = [
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": rank}
        for port, rank in zip(ports, "010", strict=True)
    ]
    folders = [["--run_dir", str(tmp_path / port)] for port in ports]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(ports[2])))
        taken.listen()
        with commands(output, *([*program, *folder] for folder in folders), environments=environments) as nodes:
            assert [node.wait(60) for node in nodes] == [1, 1, 1]
    said = output.read_text()
    assert f"node 0 of 2: waiting for the others at 127.0.0.1:{ports[0]}\n" in said, said
    assert f"node 1 of 2: connecting to node 0 at 127.0.0.1:{ports[1]}\n" in said, said
    sentences = sorted(line for line in said.splitlines() if line.startswith("gpt2 fit: error: "))
    assert len(sentences) == 3, said
    assert sentences[0].startswith(f"gpt2 fit: error: port {ports[2]} of this machine is in use")
    for line in sentences[1:]:
        assert line.startswith("gpt2 fit: error: the nodes of this job did not meet ("), said
        assert "start the same command on each" in line
    assert any(f"(127.0.0.1, {ports[1]})" in line for line in sentences)
    assert any("1/2 clients joined" in line for line in sentences)


@on_linux
@pytest.mark.slow
def test_the_kin_of_ddp_train_as_it_does(recipe, read_scalars, tmp_path):
    output = tmp_path / "output.txt"
    command = ["fit", "--config", str(recipe), "--trainer.max_steps", "4", "--validation.every_n_steps", "2"]
    assert await_exit(fork([*command, "--run_dir", "alone"], output)) == 0, output.read_text()
    for strategy in ("ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true"):
        two = ["--trainer.devices", "2", "--trainer.strategy", strategy, "--run_dir", strategy]
        with commands(output, ["-m", "gpt2_lightning", *command, *two]) as (process,):
            assert process.wait(PATIENCE) == 0, output.read_text()
        assert_close_curves(Path(strategy), Path("alone"), read_scalars, 4)


SRUN = """
import os, signal, subprocess, sys

command = sys.argv[sys.argv.index("gpt2") :]
environments = [os.environ | {"SLURM_PROCID": n, "SLURM_NODEID": n, "SLURM_LOCALID": "0"} for n in "01"]
tasks = [subprocess.Popen(command, env=environment) for environment in environments]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""


@on_linux
@pytest.mark.slow
def test_slurm_requeues_the_template_until_it_is_done(recipe, read_scalars, tmp_path):
    """The template under stand-ins for SLURM's commands and variables: two tasks, each of a node of its own."""
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
    # as SLURMEnvironment takes it from the list of nodes; the port it takes from the job's number may be in use here
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
        stopped = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
        assert 0 < stopped < steps
        template += ["--trainer.max_steps", str(stopped + 5)]
        job = start()
        assert job.wait(PATIENCE) == 0, output.read_text()
    finally:
        for pid in [*descendants(job.pid), job.pid]:
            kill_process(pid)
        job.wait()
    said = output.read_text()
    assert "node 0 of 2: waiting for the others at 127.0.0.1:" in said
    assert "node 1 of 2: connecting to node 0 at 127.0.0.1:" in said
    assert f"SIGUSR1: stopped after step {stopped}" in said
    assert f"last.ckpt at step {stopped}" in said
    assert asked.read_text() == "requeue 4242\n"
    alone = tmp_path / "alone"
    whole = ["fit", *flags, "--trainer.max_steps", str(stopped + 5), "--run_dir", str(alone)]
    assert await_exit(fork(whole, output)) == 0, output.read_text()
    assert_close_curves(run, alone, read_scalars, stopped + 5)


def test_the_slurm_template_is_short_and_bash_can_read_it():
    template = REPOSITORY / "configs/slurm/gpt2_124m.sbatch"
    assert len(template.read_text().splitlines()) < 50
    if shutil.which("bash"):
        subprocess.run(["bash", "-n", str(template)], check=True)


@pytest.mark.parametrize(
    ("strategy", "mend"),
    [
        (["fsdp"], "give fully_shard"),
        (["fsdp_cpu_offload"], "give fully_shard"),
        (["lightning.pytorch.strategies.FSDPStrategy"], "give fully_shard"),
        (["FSDPStrategy", "--trainer.strategy.sharding_strategy", "FULL_SHARD"], "give fully_shard"),
        (["deepspeed"], "give ddp"),
        (["deepspeed_stage_3_offload"], "give ddp"),
        (["ddp_spawn"], "give ddp"),
        (["ddp_fork_find_unused_parameters_false"], "give ddp"),
        (["ddp_notebook"], "give ddp"),
        (["DDPStrategy", "--trainer.strategy.start_method", "fork"], "give ddp"),
        (["single_device"], "leave it out"),
        (["single_xla"], "give auto, ddp or fully_shard"),
        (["dp"], "give auto, ddp or fully_shard"),
        (["dpd"], "give auto, ddp or fully_shard"),
    ],
)
def test_a_strategy_that_does_not_train_here_is_refused(strategy, mend, recipe, capsys):
    for accelerator in ("cpu", "auto"):
        args = ["--trainer.accelerator", accelerator, "--trainer.devices", "2", "--trainer.strategy", *strategy]
        assert main(["fit", "--config", str(recipe), *args]) == 1
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        assert said[0].startswith(f"gpt2 fit: error: trainer.strategy {strategy[0]} ")
        assert mend in said[0]
    assert not Path("run/log.txt").exists()


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({}, "MASTER_ADDR, MASTER_PORT, NODE_RANK is not set: on every node set MASTER_ADDR"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "NODE_RANK is not set"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "NODE_RANK": "2"}, "NODE_RANK is 2: on 2 nodes"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "port", "NODE_RANK": "0"}, "MASTER_PORT is port"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 is set and no launcher started this process"),
    ],
)
def test_a_node_that_cannot_meet_the_others_is_refused(environment, part, recipe, capsys, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["fit", "--config", str(recipe), "--trainer.devices", "1", "--trainer.num_nodes", "2"]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert part in said[0]

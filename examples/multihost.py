"""Trains on many processes, with clipping by the norm over all of them.

On one machine, two processes of four devices each (CPU devices if there are no others):

    python examples/multihost.py --processes 2 --devices 4

On a cluster, run one command per process. JAX detects SLURM and Kubernetes from their
environment variables; elsewhere pass --coordinator, --processes and --process:

    srun python examples/multihost.py
    python examples/multihost.py --coordinator host0:1234 --processes 2 --process 0

Every process runs the same program. `jax.distributed` connects the processes, `jax.jit`
inserts the collectives, and the optimizer is the one you would use on a single device:
no code here is specific to clipping, which is the point. With --checkpoint, which needs
Orbax, the run saves checkpoints and resumes from the latest one when it is restarted.
"""

import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

WIDTH, BATCH = 64, 64


def positive(text):
    """Parses a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def parse():
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--layout", choices=("fsdp", "data"), default="fsdp")
    parser.add_argument("--processes", type=positive, help="number of processes")
    parser.add_argument("--process", type=int, help="its index; default: start all")
    parser.add_argument("--devices", type=positive, help="CPU devices in each process")
    parser.add_argument("--coordinator", help="host:port of process 0")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="checkpoint folder")
    parser.add_argument("--save-every", type=positive, default=5)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds per step")
    return parser.parse_args()


def end(number, frame):
    """Exits on a signal; `finally` blocks then end the processes that were started."""
    del frame
    sys.exit(128 + number)


def start_all(options):
    """Starts every process on this machine; if one fails, ends the others."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        sys.exit("srun starts the processes by itself: leave out --processes.")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, *sys.argv[1:]]
    command += ["--coordinator", f"127.0.0.1:{port}"]
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    children = []
    try:
        for i in range(options.processes):
            children.append(subprocess.Popen([*command, "--process", str(i)]))
        while True:
            codes = [child.poll() for child in children]
            failed = [code for code in codes if code]
            if failed:
                print(f"A process ended with code {failed[0]}; ending the others.")
                return 1
            if None not in codes:
                return 0
            time.sleep(0.2)
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.wait()


def connect(options):
    """Connects to the other processes, before JAX initializes its devices."""
    if options.devices:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["JAX_NUM_CPU_DEVICES"] = str(options.devices)
    import jax

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's prints a traceback
    others = f"{options.processes} processes" if options.processes else "the cluster"
    print(f"Waiting for {others}.", flush=True)
    given = options.coordinator, options.processes, options.process
    try:
        jax.distributed.initialize(*given)  # SLURM or Kubernetes provides what is None
    except ValueError as error:
        if given != (None, None, None):
            sys.exit(
                f"No other process was found: {error} Outside a cluster give each "
                "process --coordinator HOST:PORT, --processes and --process; or give "
                "--processes alone, which starts all of them on this machine."
            )
        print("There is no cluster: this is the only process.", flush=True)


def train(options):
    """Trains, and prints the sums of squares of the parameters."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import optclip

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    optimizer = optclip.skip_steps(
        optax.chain(optclip.clip_by_global_norm(0.1), optax.adam(1e-2))
    )

    def init():
        keys = jax.random.split(jax.random.key(0), 2)
        params = {
            "in": jax.random.normal(keys[0], (WIDTH, WIDTH)) / WIDTH**0.5,
            "out": jax.random.normal(keys[1], (WIDTH, 1)) / WIDTH**0.5,
        }
        return params, optimizer.init(params)

    def batch(step):
        """Returns the same numbers however many devices compute them."""
        key = jax.random.fold_in(jax.random.key(1), step)
        x = jax.random.normal(key, (BATCH, WIDTH))
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("data")))
        x = jnp.where((step == 3) & (jnp.arange(BATCH) == 5)[:, None], jnp.nan, x)
        return x, jnp.sin(x[:, :1])

    def loss_fn(params, x, y):
        return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - y) ** 2)

    shapes = jax.eval_shape(init)

    def spec_of(x):
        """Under FSDP, parameters and their moments are sharded along axis 0."""
        sharded = options.layout == "fsdp" and x.shape[0] % mesh.size == 0
        return P("data") if sharded else P()

    params_specs = jax.tree.map(spec_of, shapes[0])
    specs = params_specs, optclip.state_specs(optimizer, shapes[0], params_specs)
    where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    @jax.jit
    def update(step, params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch(step))
        updates, state = optimizer.update(grads, state, params, loss=loss)
        params = optax.apply_updates(params, updates)
        place = jax.lax.with_sharding_constraint
        return *place((params, state), where), loss, optclip.metrics(state)

    params, state = jax.jit(init, out_shardings=where)()
    first, manager = 0, None
    if options.checkpoint:
        import orbax.checkpoint as ocp

        manager = ocp.CheckpointManager(options.checkpoint.resolve())
        if manager.latest_step() is not None:
            first = manager.latest_step()
            target = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                (params, state), where,
            )  # fmt: skip
            params, state = manager.restore(
                first, args=ocp.args.StandardRestore(target)
            )
    main = jax.process_index() == 0
    for step in range(first, options.steps):
        params, state, loss, metrics = update(step, params, state)
        metrics = jax.device_get(metrics)
        if main:
            print(
                f"step {step:3d}  loss {float(loss):8.5f}  "
                f"norm {metrics['skip/norm']:8.5f}  "
                f"skipped {metrics['skip/skipped_steps']}",
                flush=True,
            )
        done = step + 1
        if manager and (done % options.save_every == 0 or done == options.steps):
            manager.save(done, args=ocp.args.StandardSave((params, state)))
            manager.wait_until_finished()
        time.sleep(options.pause)
    total = jax.jit(lambda p: jax.tree.map(lambda x: jnp.sum(x * x), p))(params)
    if main:
        for bad in optclip.nonfinite_leaves(state, params):
            print(f"step {bad.step:3d}  left out: {bad.nan} NaN in {bad.path}")
        sums = {name: float(x) for name, x in jax.device_get(total).items()}
        print(
            f"{jax.process_count()} processes, {jax.device_count()} devices, sums of "
            f"squares: in {sums['in']:.9g}, out {sums['out']:.9g}"
        )
    if manager:
        manager.close()


if __name__ == "__main__":
    options = parse()
    alone = options.coordinator is None and options.process is None
    if alone and options.processes:
        sys.exit(start_all(options))
    connect(options)
    train(options)

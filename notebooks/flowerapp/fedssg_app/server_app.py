"""The app of the server: it carries the questions of `fedssg_helpers.server` over Flower's grid."""

import json
import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from fedssg_helpers import server
from fedssg_helpers.client import Faults
from fedssg_helpers.keys import one_thread
from fedssg_helpers.methods import Method, RealImages, describe, rebuild

from . import task

app = ServerApp()


class Network:
    """A channel to hospitals on Flower's nodes, as `server.Threads` is one to hospitals in this process.

    Flower numbers its nodes at random, and answers arrive in any order: a hospital says who it is in its first answer,
    and answers are sorted by hospital. Who is silent for `patience` seconds is not asked again.
    """

    compute = "cpu"  # where the server's own PyTorch computes

    def __init__(self, grid: Grid, patience: float):
        self.grid, self.patience, self.nodes = grid, patience, {}

    def ask(self, question: str, contents: dict[int, dict]):
        """Yield (k, answer or None, why not) in order of hospitals."""
        if question == "report":
            yield from self._gathered(contents)
            return
        asked = [k for k in contents if k in self.nodes]
        if contents and not asked:
            raise ValueError("no hospital is left to ask: each was silent for too long")
        answers = self._answers(question, {self.nodes[k]: contents[k] for k in asked})
        silent = None, f"no answer within {self.patience:.0f} seconds"
        for k in asked:
            node = self.nodes[k] if self.nodes[k] in answers else self.nodes.pop(k)
            yield k, *answers.get(node, silent)

    def memories(self) -> dict:
        """Nothing: what hospitals remember stays with them."""
        return {}

    def _answers(self, question: str, contents: dict[int, dict]) -> dict[int, tuple[dict | None, str]]:
        """Send each node its content, wait, and open what comes: (answer or None, why not) by node."""
        records = {
            id(content): task.encode(content) for content in contents.values()
        }  # many share one content
        kind = f"{task.KINDS[question]}.{question}"
        messages = [
            Message(records[id(content)], dst_node_id=n, message_type=kind) for n, content in contents.items()
        ]
        replies = self.grid.send_and_receive(messages, timeout=self.patience)
        return {reply.metadata.src_node_id: opened(reply) for reply in replies}

    def _gathered(self, contents: dict[int, dict]):
        """Ask every node that appears for its report, until there is one for each hospital."""
        found, seen, end = {}, set(), time.monotonic() + self.patience
        while len(found) < len(contents):
            new = set(self.grid.get_node_ids()) - seen
            seen |= new
            for node, (answer, why) in (
                self._answers("report", dict.fromkeys(new, contents[0])).items() if new else ()
            ):
                if why:
                    raise ValueError(f"a hospital cannot take part: {why}")
                k, last = answer.get("hospital"), len(contents) - 1
                if k in found or k not in contents:
                    cure = f"needed is one node for each of 0 to {last}: set partition-id in its node config"
                    raise ValueError(f"a node says that it is hospital {k}; {cure}")
                self.nodes[k], found[k] = node, answer
            if time.monotonic() > end and len(found) < len(contents):
                there = f"only hospitals {sorted(found)} of 0 to {len(contents) - 1} were there"
                raise ValueError(
                    f"{there} within {self.patience:.0f} seconds; start the others, or ask for fewer"
                )
            time.sleep(0.1)
        yield from ((k, found[k], "") for k in contents)


def opened(reply: Message) -> tuple[dict | None, str]:
    """A hospital's answer, or None and why there is none."""
    if reply.has_error():
        return None, f"Flower could not get its answer: {reply.error.reason.strip().splitlines()[-1]}"
    try:
        answer = task.decode(reply.content)
    except Exception as error:  # whatever a hospital sends, the server goes on
        return None, f"sent a message that cannot be read ({type(error).__name__}: {error})"
    return (None, str(answer["why"])) if "why" in answer else (answer, "")


def refusal(method: Method) -> str:
    """Why a method cannot run over a network, "" where it can."""
    if method.pooled or isinstance(getattr(method.sharing, "source", None), RealImages):
        return "this method moves real images out of hospitals; it runs in one process only, with server.run"
    try:
        rebuild(describe(method))
    except ValueError as error:
        return f"{error}; or run it in one process, with server.run"
    return ""


@one_thread()
def serve(
    grid: Grid, hospitals: int, method: Method, seed: int, *, patience: float = 600.0, **settings
) -> server.Run:
    """`server.run` over a network: `server.serve` through the channel `Network`, with the same settings."""
    if why := refusal(method):
        raise ValueError(why)
    return server.serve(Network(grid, patience), hospitals, method, seed, **settings)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """The server, as `flwr run` starts it: settings come from the run config, the result goes to a file."""
    from fedssg_helpers import runs  # here, because hospitals can do without pandas

    config, ended = context.run_config, []
    text, hospitals, result = config["method"], config["hospitals"], Path(config["result"])
    method = rebuild(json.loads(text)) if text.startswith("{") else runs.recipe(runs.Job(text))

    def after_round(r: int, run: server.Run) -> None:
        ended.append(time.time())
        there = (
            f"{run.took_part[-1].sum()} of {hospitals} hospitals" if r else f"{hospitals} hospitals are ready"
        )
        print(f"round {r} of {config['rounds']}: {there}", flush=True)

    settings = {name: config[name] for name in ("rounds", "epochs")}
    settings |= {"patience": float(config["patience"]), "after_round": after_round}
    faults = Faults(*(float(config[name]) for name in ("absent", "die", "late")))
    run = serve(grid, hospitals, method, config["seed"], faults=faults, **settings)
    runs.save(run, result)
    result.with_suffix(".json").write_text(json.dumps(ended))  # when each round ended, in seconds

"""Training beside a serving gateway on the same cores, by plan and without one.

    python -m benchmarks.sharing --quick

By plan is how a deployment runs: processes see that another one computes and divide the cores, and threads do
not spin for long. Without one, each process uses all cores, and OpenMP's threads wait as they do by default.
"""

import threading
from collections.abc import Callable
from itertools import cycle
from typing import Any

from benchmarks.common import (
    Measurement,
    Unavailable,
    Worker,
    alternate,
    closing,
    number,
    options,
    parser,
    print_json,
    ratio,
    start,
    table,
)
from benchmarks.deployment import deployment_environment
from benchmarks.serving import ADAPTERS, Run

CLIENTS = 8
SPINS = "300000"
"""libgomp's own default."""
PLAN, FREE = "by plan", "no plan"


def main() -> None:
    arguments = parser(str(__doc__).split("\n\n")[0])
    arguments.add_argument("--examples", type=int, help="of a training; default 128, with --quick 64")
    given = arguments.parse_args()
    run = Sharing(options(given), given.examples or (64 if given.quick else 128))
    with closing(run.open):
        run.prepare()
        run.print(run.measure_both())


class Sharing(Run):
    """Two gateways and two trainers, of which one of each computes at a time."""

    def __init__(self, given: Any, examples: int):
        super().__init__(given, 1)
        self.examples = examples
        self.trainers: dict[str, Worker] = {}

    def prepare(self) -> None:
        """Start what is measured, and warm it up."""
        self.prepare_ours()
        for name, extra in ((PLAN, {}), (FREE, {"GOMP_SPINCOUNT": SPINS})):
            log = self._log(f"sharing-{name.replace(' ', '-')}")
            target = self.gateway_target(log, extra)
            self.open[f"gateway {name}"] = target.server
            target.server.wait(300)
            target.questions = cycle(self.questions)
            self.targets[name] = target
            self._ask(target, target.models, 1, ADAPTERS)
            environment = deployment_environment(self.settings) | extra
            trainer = Worker(f"sharing-{name}", "benchmarks.ours", self.options, None, **environment)
            self.open[f"trainer {name}"] = self.trainers[name] = trainer
            trainer.ask("load", directory=self.base)
        first = self.trainers[PLAN]
        self.batch = first.ask("examples", task="headlines", first=0, count=self.examples)["examples"]
        for name in self.trainers:
            self._train(name, self.batch[:8])

    def _train(self, name: str, examples: list[Any]) -> Measurement:
        recipe = {"rank": 8, "alpha": 16, "epochs": 1, "batch_tokens": 1024, "learning_rate": 5e-4}
        # without a plan the gateway does not see the training: the lock is another deployment's
        home = self.settings.home if name == PLAN else self.settings.home / "elsewhere"
        output = str(self.options.cache / "sharing")
        answer = self.trainers[name].ask(
            "train", examples=examples, recipe=recipe, output=output, home=str(home)
        )
        return {"trained": answer["tokens"] / answer["seconds"]}

    def _both(self, name: str) -> Measurement:
        """Clients ask for as long as the training takes."""
        found: Measurement = {}
        training = threading.Thread(target=lambda: found.update(self._train(name, self.batch)))
        training.start()
        rounds: list[Measurement] = []
        while training.is_alive():
            rounds.append(self._cell(self.targets[name], ADAPTERS, CLIENTS))
        training.join()
        if "trained" not in found:
            raise Unavailable("the training failed; see its log")
        whole = rounds[:-1] or rounds  # the last one went on alone
        for figure in ("tokens", "p99"):
            found[figure] = sum(one[figure] for one in whole) / len(whole)
        return found

    def measure_both(self) -> dict[str, Any]:
        variants: dict[str, Callable[[], Measurement]] = {
            "training alone": lambda: self._train(PLAN, self.batch),
            "gateway alone": lambda: self._cell(self.targets[PLAN], ADAPTERS, CLIENTS),
            PLAN: lambda: self._both(PLAN),
            FREE: lambda: self._both(FREE),
        }
        return alternate(variants, self.options.rounds, self.options.left)

    def print(self, found: dict[str, Any]) -> None:
        trained = found["training alone"].median("trained")
        served = found["gateway alone"].median("tokens")
        rows, kept = [], dict[str, float | None]()
        for name, measured in found.items():
            shares = [ratio(measured.median("trained"), trained), ratio(measured.median("tokens"), served)]
            kept[name] = None if None in shares else sum(share or 0.0 for share in shares)
            p99 = measured.median("p99")
            rows.append(
                [
                    name,
                    number(measured.median("trained"), 0),
                    number(shares[0]),
                    number(measured.median("tokens"), 1),
                    number(shares[1]),
                    number(p99 and 1000 * p99, 0),
                    str(len(measured.rounds)),
                    measured.reason,
                ]
            )
        header = ["what runs", "trained tokens/s", "of alone", "new tokens/s", "of alone", "p99 ms", "rounds"]
        title = f"Training (headlines) beside a gateway with {CLIENTS} clients, {ADAPTERS} adapters"
        print(table(f"{title}, {self.dtype}", [*header, "note"], rows))
        print_json(
            {
                "training_kept": ratio(found[PLAN].median("trained"), trained),
                "serving_kept": ratio(found[PLAN].median("tokens"), served),
                "plan_vs_none": ratio(kept[PLAN], kept[FREE]),
            }
        )


if __name__ == "__main__":
    start(main)

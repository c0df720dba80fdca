"""Who answers better: runs against a reference on the same prompts, by a judge, at what divergence and what length.

    python experiments/win_rate.py --reference=runs/sft 'DPO=runs/dpo_*' 'IPO=runs/ipo_*' --figure=win_rate.png
    python experiments/win_rate.py --reference=runs/sft runs/dpo@100 --questions=questions.txt --best_of=4

Without --questions it asks what the runs hold out. A judge is rule:NAME, reward:DIR[,DIR...] or model:DIR.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console  # noqa: E402  the checkout must be importable first

from jaxllm import figures  # noqa: E402
from jaxllm.evaluate import duels, judges  # noqa: E402
from jaxllm.generate import SamplerConfig  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="LABEL=GLOB", help="runs, such as the seeds of a method")
    parser.add_argument("--reference", required=True, metavar="DIR[@STEP]", help="the run that all are compared with")
    parser.add_argument("--judge", nargs="+", default=["rule:style"], help="the first counts, the others are shown too")
    parser.add_argument("--questions", default="", help="a .txt, a question per line, or conversations, preferences")
    parser.add_argument("--limit", type=int, default=200, help="at most so many prompts")
    parser.add_argument("--best_of", type=int, default=0, help="the best of N answers of the reference plays too")
    parser.add_argument("--by", default="", help="the judge that chooses it; the first --judge, unless told")
    parser.add_argument("--ranking", action="store_true", help="compare every two players: Elo")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits; 0 is greedy")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="at most so many per answer")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same answers")
    parser.add_argument("--out", help="JSON file for all numbers and all answers")
    parser.add_argument("--figure", help="PNG of win rates against divergence")
    args = parser.parse_args()
    reference, groups = duels.player(args.reference), dict(map(duels.group, args.groups))
    prompts = duels.prompts([reference, *sum(groups.values(), [])], args.questions)[: args.limit]
    sampling = duels.Sampling(SamplerConfig(args.temperature), args.max_new_tokens, seed=args.seed)
    by, chooser = {spec: judges.load(spec) for spec in args.judge}, judges.load(args.by or args.judge[0])
    found = duels.contest(reference, groups, prompts, by, sampling, best_of=args.best_of, by=chooser)
    content = found.report | {"command": sys.argv, "answers": found.answers}
    Console().print(duels.table(found.report))
    if args.ranking:
        ratings = duels.ranking(found, by[args.judge[0]])
        content["ranking"] = {rating.player: rating.elo for rating in ratings}
        Console().print(duels.ladder(ratings))
    if args.figure:
        figures.scatter(duels.points(found.report), args.figure, title="Win rate", across="KL, nats", level=0.5)
    if args.out:
        Path(args.out).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")

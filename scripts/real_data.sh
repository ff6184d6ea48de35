#!/usr/bin/env bash
# The two recipes on real data and a real 260K-parameter model, in full; writes the tables of docs/results.
# RELAY_TEST_DATA is the folder that holds stories260K, hh-rlhf and polite-pref; default ../shared/data.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh ""
export RELAY_TEST_DATA=${RELAY_TEST_DATA:-$(cd ../shared/data && pwd)}

python scripts/seeds.py tests/recipes/polite_stories260k.yaml --out docs/results/polite.md --note \
"The acceptance run on data nobody here wrote: Llama-3.1-written polite and impolite replies, and the 260,032-parameter
stories260K. \`reward\` and \`judge\` are LoRA reward models trained on disjoint halves of the pairs; PPO climbs \`reward\` and never
sees \`judge\`. The bars: \`reward: held_out/accuracy\` at least 0.75, and \`score/judge/model\` above \`score/judge/against\`, on every
seed. A model of this size writes no sense: what it learns is polite phrases, and the KL says how far it went for them. The
\`judge\` stage has a seed of its own: it is the same in all columns."
python scripts/seeds.py tests/recipes/hh_stories260k.yaml --seeds 0 --out docs/results/hh.md --note \
"HH-RLHF's test splits (8552 pairs, about half of which fit the model's 512 tokens), held out by prompt. A reward model on a
260,032-parameter story model is at chance here: the 95 % interval of an accuracy on this many pairs is about +/- 0.07. PPO then does
what it is told and moves the mean score of that reward model. This run shows that the chain works on real input, not that the
model learned what people prefer."

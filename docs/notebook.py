# %% [markdown]
# # expertlane from Python
#
# The commands are functions: the same options, with underscores, and the same defaults. Run this
# file as it is (`python docs/notebook.py`: some seconds, no GPU), or open it as a notebook, where a
# result at a cell's end shows its answer as tables. `help(expertlane.simulate)` lists all options.

# %%
from pathlib import Path
from tempfile import TemporaryDirectory

import expertlane

# %% [markdown]
# ## Which deployment?
# On four H100, for 64 concurrent requests. `.answer` is what the command prints, `.page` the whole
# report with its charts.

# %%
plan = expertlane.plan("paper-small", cluster="h100x4", batch=64, prompt_len=128, output_len=32)
print(plan.answer)

# %% [markdown]
# ## One deployment in detail, at several concurrencies

# %%
even = expertlane.simulate(
    "paper-small",
    layout="dp=4,ep=4",
    cluster="h100x4",
    batch=[8, 64],
    prompt_len=128,
    output_len=32,
    skew=0,
)
for load in even.deployments[0].serving:
    print(f"concurrency {load.batch}: {load.output_tps.value:,.0f} output tokens/s")

# %% [markdown]
# As a data frame (with pandas: `pip install 'expertlane[pandas]'`); columns say their units.

# %%
try:
    table = even.to_pandas()
    print(
        table[table["row"] == "serving"][
            ["deployment", "batch", "output_tokens_per_s", "ttft_s_p95"]
        ]
    )
except expertlane.ExpertlaneError as missing:  # all errors of the package are of this class
    print(missing)

# %% [markdown]
# ## What changes where some experts are in demand?
# `diff` compares deployment by deployment and load by load. As a command it exits with 1 on a
# regression.

# %%
skewed = expertlane.simulate(
    "paper-small",
    layout="dp=4,ep=4",
    cluster="h100x4",
    batch=[8, 64],
    prompt_len=128,
    output_len=32,
    skew=0.8,
)
change = expertlane.diff(even, skewed, threshold=5)
print(change.answer)
for worse in change.regressions:
    print(f"worse by {-worse.gain:.0%}: {worse.metric} at {worse.where}")

# %% [markdown]
# ## Files
# Nothing is written unless a folder is given: here, or with `out=`.

# %%
with TemporaryDirectory() as folder:
    even.save(Path(folder, "even"))  # results.json, report.md, report.html
    even.export(Path(folder, "even.csv"))
    again = expertlane.load_results(Path(folder, "even"))
    print(sorted(each.name for each in Path(folder).rglob("*.*")))
print(again, "was made by", again.command)

# %% [markdown]
# ## Run a model
# `LLM`, `bench` and `compare` start ranks as processes, and end them.

# %%
prompts = [[1, 2, 3], [5, 6]]  # token ids; text where the checkpoint has a tokenizer
with expertlane.LLM("paper-tiny", layout="dp=2,ep=2") as llm:
    for output in llm.generate(prompts, expertlane.SamplingParams(temperature=0, max_tokens=5)):
        print(output.prompt_token_ids, "→", output.token_ids)

# %% [markdown]
# Measured under load, and a plan's experiment run here: its deployments side by side.

# %%
measured = expertlane.bench("paper-tiny", batch=2, prompt_len=8, output_len=8)
print(measured.answer)
with TemporaryDirectory() as folder:
    expertlane.plan("paper-tiny", cluster="h100x2", batch=8, prompt_len=8, output_len=4, out=folder)
    compared = expertlane.compare(Path(folder, "experiment.toml"))
print(compared.answer)

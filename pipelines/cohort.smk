# One cohort, stage by stage, on a cluster: the command line's stages as rules, no logic of its own.
#
#   pip install -c constraints.txt -e '.[cluster]'     (in synthmed's folder; `make` has done so)
#   snakemake -s cohort.smk --cores 2 --config config=quickstart run=runs/quickstart
#
# config   a YAML file or the name of a shipped config
# run      the run's folder (default runs/<stem of config>)
# args     more arguments for the first stage, such as args="--input FOLDER --set seed=1"
# device   auto, cpu or cuda
# threads  threads a stage may use (default 8; never more than --cores)
#
# Snakemake limits a rule to its threads, so without `threads` training would have one core. The
# same number of threads as `synthmed generate` used gives the same bytes.
#
# Give train its resources in a profile (set-resources: train:slurm_partition=gpu). A killed job
# goes on from its last checkpoint when Snakemake runs the rule again. A changed config file sets
# all rules off again; a stage that still fits is left as it is, and one that does not fit stops
# with its name until args="--overwrite".
import pathlib
import sys

if "config" not in config:
    raise WorkflowError("no config: add --config config=FILE, or the name of a shipped one")
CONFIG = str(config["config"])
CONFIG_FILE = [CONFIG] if pathlib.Path(CONFIG).is_file() else []
RUN = str(config.get("run", f"runs/{pathlib.Path(CONFIG).stem}"))
ARGS = config.get("args", "")
DEVICE = config.get("device", "auto")
THREADS = int(config.get("threads", 8))
PRIVATE = f"{RUN}/private"

# the command beside this Python, also where the environment is not activated
SYNTHMED = pathlib.Path(sys.executable).with_name("synthmed")
SYNTHMED = str(SYNTHMED) if SYNTHMED.exists() else "synthmed"


rule all:
    input:
        f"{PRIVATE}/report/report.json",


# `update`: Snakemake deletes other outputs before a rule runs, and with them what could be kept
rule ingest:
    input:
        CONFIG_FILE,
    output:
        update(f"{PRIVATE}/ingest/manifest.json"),
    threads: THREADS
    shell:
        "{SYNTHMED:q} ingest {RUN:q} --config {CONFIG:q} {ARGS}"


rule prepare:
    input:
        rules.ingest.output,
    output:
        update(f"{PRIVATE}/prepare/manifest.json"),
    threads: THREADS
    shell:
        "{SYNTHMED:q} prepare {RUN:q}"


rule train:
    input:
        rules.prepare.output,
    output:
        update(f"{PRIVATE}/model/manifest.json"),
    threads: THREADS
    shell:
        "{SYNTHMED:q} train {RUN:q} --device {DEVICE}"


rule sample:
    input:
        rules.train.output,
    output:
        update(f"{PRIVATE}/sample/manifest.json"),
    threads: THREADS
    shell:
        "{SYNTHMED:q} sample {RUN:q} --device {DEVICE}"


rule screen:
    input:
        rules.sample.output,
    output:
        update(f"{PRIVATE}/screen/manifest.json"),
    threads: THREADS
    shell:
        "{SYNTHMED:q} screen {RUN:q} --device {DEVICE}"


rule evaluate:
    input:
        rules.screen.output,
    output:
        update(f"{PRIVATE}/evaluate/manifest.json"),
    threads: THREADS
    shell:
        "{SYNTHMED:q} evaluate {RUN:q} --device {DEVICE}"


# REVIEW and WITHHELD (exit 4) are results, not failures of the workflow
rule release:
    input:
        rules.evaluate.output,
    output:
        update(f"{PRIVATE}/report/report.json"),
    threads: THREADS
    shell:
        "{SYNTHMED:q} release {RUN:q} || [ $? -eq 4 ]"

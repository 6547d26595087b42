# One cohort, stage by stage, on a cluster: the command line's stages as rules, no logic of its own.
#
#   pip install "synthmed[cluster]"
#   snakemake -s cohort.smk --cores 2 --config config=quickstart run=runs/quickstart
#
# config  a YAML file or the name of a shipped config
# run     the run's folder (default runs/<stem of config>)
# args    more arguments for the first stage, such as "--input FOLDER --set seed=1"
# device  auto, cpu or cuda
#
# Give train its resources in a profile (set-resources: train:slurm_partition=gpu). A killed job
# goes on from its last checkpoint when Snakemake runs the rule again.
import pathlib

CONFIG = config["config"]
RUN = config.get("run", f"runs/{pathlib.Path(CONFIG).stem}")
ARGS = config.get("args", "")
DEVICE = config.get("device", "auto")
PRIVATE = f"{RUN}/private"


rule all:
    input:
        f"{PRIVATE}/report/report.json",


rule ingest:
    output:
        f"{PRIVATE}/ingest/manifest.json",
    shell:
        "synthmed ingest {RUN} --config {CONFIG} {ARGS}"


rule prepare:
    input:
        rules.ingest.output,
    output:
        f"{PRIVATE}/prepare/manifest.json",
    shell:
        "synthmed prepare {RUN}"


rule train:
    input:
        rules.prepare.output,
    output:
        f"{PRIVATE}/model/manifest.json",
    shell:
        "synthmed train {RUN} --device {DEVICE}"


rule sample:
    input:
        rules.train.output,
    output:
        f"{PRIVATE}/sample/manifest.json",
    shell:
        "synthmed sample {RUN} --device {DEVICE}"


rule screen:
    input:
        rules.sample.output,
    output:
        f"{PRIVATE}/screen/manifest.json",
    shell:
        "synthmed screen {RUN} --device {DEVICE}"


rule evaluate:
    input:
        rules.screen.output,
    output:
        f"{PRIVATE}/evaluate/manifest.json",
    shell:
        "synthmed evaluate {RUN}"


# REVIEW and WITHHELD (exit 4) are results, not failures of the workflow
rule release:
    input:
        rules.evaluate.output,
    output:
        f"{PRIVATE}/report/report.json",
    shell:
        "synthmed release {RUN} || [ $? -eq 4 ]"

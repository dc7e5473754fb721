# The two commands: `make repro` and `make test`. Both make .venv from requirements.lock first.
PYTHON ?= python3
BIN := .venv/bin
CPU_WHEELS := https://download.pytorch.org/whl/cpu
TORCH := $(shell sed -n 's/^torch==/torch==/p' requirements.lock)
# PyPI's torch for Linux brings several gigabytes of CUDA: without an NVIDIA driver the CPU build is taken where it can be reached
INDEX := $(if $(shell command -v nvidia-smi),,--extra-index-url $(CPU_WHEELS))
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1

.PHONY: repro test env zoo lint bench peers drills lock clean

repro: env
	dvc repro

test: env lint
	pytest -n 2 --dist loadfile --no-loadscope-reorder

env: .venv/ready

.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -U pip
	$(BIN)/pip install -q --retries 0 --no-deps $(INDEX) $(TORCH)
	$(BIN)/pip install -q -c requirements.lock -e '.[dev]'
	$(BIN)/pip check
	touch $@

lint: env
	ruff check .
	ruff format --check .
	mypy
	lint-imports

zoo: env
	dvc repro zoo/dvc.yaml
	dgm promote
	dgm report

bench: env
	python benchmarks/ray_train_overhead.py
	python benchmarks/scaling.py
	python benchmarks/streaming.py
	python benchmarks/plan_memory.py
	python benchmarks/plan_scaling.py
	python benchmarks/disentanglement.py

# our training steps beside other libraries', which go into a folder of their own
peers: env
	pip install -q --no-deps --target .dgm/peers pythae==0.1.2 torch-mimicry==0.1.16 zuko==1.6.0 nflows==0.14 \
		diffusers==0.42.1 huggingface_hub==2.4.0 hf-xet==1.8.0 httpx2==2.16.2 httpcore2==2.16.2 truststore==0.10.5 \
		torchcfm==1.0.7 POT==0.9.7.post1 torchebm==0.8.9 normflows==1.7.3
	PYTHONPATH=.:.dgm/peers python benchmarks/peers.py
	PYTHONPATH=.:.dgm/peers python benchmarks/flow_peers.py
	PYTHONPATH=.:.dgm/peers python benchmarks/diffusion_peers.py
	PYTHONPATH=.:.dgm/peers python benchmarks/likelihood_peers.py

# every fault; needs Linux and root (or `unshare --user --map-root-user --mount`) for those that need hosts
drills: env
	dgm drill --log docs/reliability.jsonl

# the newest versions that pyproject.toml allows, as the new lock
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install -q -U pip
	.venv-lock/bin/pip install -q --retries 0 --no-deps $(INDEX) $(TORCH)
	.venv-lock/bin/pip install -q -e '.[dev]'
	(sed -n '/^#/p' requirements.lock; .venv-lock/bin/pip freeze --exclude-editable | sed 's/+cpu$$//') > requirements.lock.new
	mv requirements.lock.new requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf searches/* comparisons/* zoo/artifacts zoo/samples zoo/evaluations zoo/receipts data extractors artifacts samples evaluations receipts promotions report .dgm mlflow.db mlartifacts

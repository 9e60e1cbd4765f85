# One target, one promise. Needs Python 3.11+, make, and a package registry; nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-slow test-lmms lint photos clean
setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e ".[dev]"
	touch $@

demo: setup  ## the main job on the built-in scenes, with the ViT that ships
	$(BIN)/winnow compare --out demo --results demo/rows.jsonl

METHODS := $(foreach r,4 8 13 16 20,"ToMe(r=$(r))") \
  $(foreach k,0.97 0.95 0.925 0.9,"PiToMe(keep=Keep($(k)))") \
  $(foreach k,0.9 0.7 0.5 0.3,"EViT(keep=Keep($(k)))" "TopK(keep=Keep($(k)))" "Random(keep=Keep($(k)))" \
    "Grid(keep=Keep($(k)))" "Pool(keep=Keep($(k)))") \
  $(foreach q,0.1 0.2 0.35 0.5,"NormThreshold(Below($(q),of='quantile'),(3,6,9))") \
  $(foreach s,192 160 144 128,"Downsample($(s))")

photos: setup  ## the README's table: make photos PHOTOS=photos.csv WEIGHTS=model.safetensors
	$(BIN)/winnow compare timm:vit_tiny_patch16_224 --weights $(WEIGHTS) --data $(PHOTOS) \
	  --results results/photos.jsonl --out photos --pairs 9 $(foreach m,$(METHODS),--method $(m))
	$(BIN)/winnow report results/photos.jsonl --out photos/plain
	cp photos/plain/accuracy-macs.svg results/photos-macs.svg
	cp photos/plain/accuracy-time.svg results/photos-time.svg
	$(BIN)/python docs/readme.py

# one thread for each of the two processes: two each wait for one another's
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow

# lmms-eval brings a hundred packages, so it has an environment of its own
test-lmms: setup
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python .venv-lmms
	$(BIN)/uv pip install --quiet --python .venv-lmms/bin/python -e ".[dev,lmms]"
	.venv-lmms/bin/python -m pytest tests/test_lmms_eval.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-lmms demo build dist .pytest_cache .mypy_cache .ruff_cache

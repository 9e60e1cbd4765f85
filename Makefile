# One target, one promise. Needs Python 3.11+, make, and a package registry; nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-slow lint results clean
setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e ".[dev]"
	touch $@

demo: setup  ## the main job on photographs that come with a dependency, random weights
	$(BIN)/winnow compare timm:vit_tiny_patch16_224 --data photographs --out demo \
	  --method "ToMe(r=8)" --method "ToMe(r=16)" --method "EViT()" --method "TopK()"

test: setup
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv demo build dist .pytest_cache .mypy_cache .ruff_cache

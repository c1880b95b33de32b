# The commands of this project.  `make setup` first; the rest uses its virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What looks at the environment stands outside it, so that it does not change what it sees.
TOOLS := .venv-tools

.PHONY: setup demo test soak browser check errors bench audit sbom wheel reference docs pictures clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install -q -e '.[dev]' -c constraints.txt
	$(BIN)/dist-lm ops build
	touch $@

demo: setup
	$(BIN)/dist-lm demo --out demo

# In two processes; tests/conftest.py says what each takes.
test: setup
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder

# Random faults for MINUTES, and every crash point and signal under every launcher.
MINUTES ?= 20
soak: setup
	DIST_LM_SOAK_MINUTES=$(MINUTES) $(BIN)/python -m pytest -m soak

# The HTML pages in a headless Chromium.
browser: setup
	@command -v chromedriver >/dev/null || { echo "make browser needs Chromium and chromedriver: apt-get install chromium chromium-driver"; exit 2; }
	$(BIN)/python -m pytest -m browser

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m fast

# docs/errors.md, from the classes of errors.
errors: setup
	$(BIN)/python docs/make_errors.py

# docs/configuration.md and docs/commands.md, from the schema and the verbs.
reference: setup
	$(BIN)/python docs/make_reference.py

# The site of docs/*.md in site/; every link is checked.
docs: setup
	$(BIN)/python -m pip install -q -e '.[docs]' -c constraints.txt
	$(BIN)/mkdocs build --strict

# docs/images/*.png, from the runs of `make demo` and one more on a terminal.
pictures: setup
	$(BIN)/python docs/make_pictures.py demo

bench: setup
	$(BIN)/python bench/step.py
	$(BIN)/python bench/data.py

$(TOOLS)/ready: Makefile
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install -q pip-audit==2.10.1 cyclonedx-bom==7.5.0
	touch $@

# Known vulnerabilities of the pinned packages.  It asks pypi.org, so it needs the network; a package that
# could not be looked up is a failure.
audit: $(TOOLS)/ready
	$(TOOLS)/bin/pip-audit -r constraints.txt --no-deps --disable-pip --strict --progress-spinner off

# dist/sbom.json (CycloneDX): what is installed in $(VENV), with versions and licences.
sbom: setup $(TOOLS)/ready
	mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --mc-type library \
		--short-PURLs --output-reproducible --of JSON --output-file dist/sbom.json

# dist/*.whl; with TAG=vX.Y.Z only where that is the version, and the changelog has it as released.
TAG ?=
wheel: setup
	@test -z "$(TAG)" || { test "$(TAG)" = "v$$($(BIN)/python -c 'import dist_lm; print(dist_lm.__version__)')" \
		&& grep -q "^## $(TAG:v%=%)$$" CHANGELOG.md; } \
		|| { echo "$(TAG) is not the version of dist_lm/__init__.py with a heading of its own in CHANGELOG.md"; exit 2; }
	$(BIN)/python -m pip wheel -q --no-deps -w dist .

clean:
	rm -rf demo dist site $(VENV) $(TOOLS)

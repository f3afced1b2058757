# The front door. `make` lists the targets; every one sets up what it needs.
#
#   make export MODEL=allenai/OLMo-2-0425-1B REVISION=main OUT=packages/olmo2 VARIANTS="fp32 q4 q8"

MODEL     ?= demo
REVISION  ?=
OUT       ?=
VARIANTS  ?= fp32 q4
PRECISION ?= bf16
SUPPORT ?=
PROMPT    ?= In the beginning
EXTRAS    ?= dev
ROW       ?=
TENSORRT  ?=
PYTHON    ?= $(shell command -v python3.11 || command -v python3)

VENV      := .venv
BIN       := $(VENV)/bin
COMMA     := ,
STAMP     := $(VENV)/.installed-dev
# torch first: a package that merely allows it must not choose another build of it
PIP       := pip install --quiet --disable-pip-version-check --constraint constraints.txt

# What a user writes here reaches the shell through the environment, as it is: neither make nor the shell reads a $ or a quote in it.
override MODEL    := $(value MODEL)
override REVISION := $(value REVISION)
override OUT      := $(value OUT)
override PROMPT   := $(value PROMPT)
override ROW      := $(value ROW)
export MODEL REVISION OUT PROMPT ROW
DEFAULT_OUT   := : "$${OUT:=packages/$$(basename "$$MODEL")}";
REVISION_FLAG := $${REVISION:+--revision "$$REVISION"}

# Compiled once for all the processes that tests start, whatever the user has said: an import of all takes a second more each time else.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup export test test-all support test-page test-interop test-quantised test-pythons test-oldest check format lint types docs docs-links bench targets bench-serve gpu-test peers clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed-$(EXTRAS) ## make .venv with what constraints.txt pins (EXTRAS=cpu: a runner alone)

# pip would compile 18,000 files one after another, a sixth of them the tests of others; some are no Python of this version.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(if $(filter dev dev$(COMMA)% export export$(COMMA)%,$*),$(BIN)/$(PIP) --no-compile torch)
	$(BIN)/$(PIP) --no-compile --editable '.[$*]'
	@$(BIN)/python -m compileall -qq -j 0 -x /tests/ $(VENV)/lib || true
	@touch $(addprefix $(VENV)/.installed-,$(subst $(COMMA), ,$*)) $@

export: $(STAMP) ## MODEL -> package, parity, TensorRT engine, and a sample of text
	$(DEFAULT_OUT) $(BIN)/olmo2-export export "$$MODEL" --out "$$OUT" --force $(REVISION_FLAG) $(addprefix --variant ,$(VARIANTS))
	$(DEFAULT_OUT) $(BIN)/olmo2-export verify "$$OUT" --reference "$$MODEL" $(REVISION_FLAG)
	$(DEFAULT_OUT) $(BIN)/olmo2-export build "$$OUT" --precision $(PRECISION)
	@$(DEFAULT_OUT) if [ -f "$$OUT/tokenizer.json" ]; \
	then printf '\n%s' "$$PROMPT"; $(BIN)/olmo2-run generate "$$OUT" --prompt "$$PROMPT" --max-new-tokens 80 --temperature 0.7 --seed 1 --stats; \
	else printf '%s has no tokenizer.json: no sample of text\n' "$$MODEL"; fi

# A process per CPU, each test file in one of them, the longest first; then what asserts time, memory, locks, signals or kills, by itself.
# Both read the packages that the first has made. What repeats another test for another row is slow: tests/support/slow.py lists it.
FAST := and not slow

support: SUPPORT := write
support: test-all ## all tests, and the support matrix written anew from what they have seen

test-all: FAST :=
test-all: test ## the tests, and those that repeat them for another model, precision, shape or page; a quarter of an hour

test: $(STAMP) ## the tests
	rm -rf build/shared
	$(BIN)/python -m pytest --shared=build/shared --support=$(or $(SUPPORT),$(if $(FAST),part,check)) --durations 25 -m 'not alone $(FAST)' -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest --shared=build/shared --durations 25 -m 'alone $(FAST)'

check: $(VENV)/.installed-dev$(COMMA)docs ## format, lint, types, docs and tests: what CI runs
	$(MAKE) --jobs 2 format lint types docs
	$(MAKE) test

format: $(STAMP)
	$(BIN)/ruff format --check .

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

docs: $(VENV)/.installed-docs ## these pages and the API as a site, in build/docs
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

docs-links: ## the links that lead out of the docs; fetches none
	@grep -rnoE --include='*.md' 'https?://[^ )>`]+' README.md CHANGELOG.md docs

$(VENV)/.installed-docs: $(STAMP)

bench: $(STAMP) ## the 1B shape beside every peer that is installed, by context and batch size; about an hour
	$(BIN)/python -m olmo2_export.bench compare --contexts 128 1024 --batch-sizes 1 4 --repeats 3 --minutes 45

targets: $(STAMP) ## the table of targets on the 1B shape, and what quantising costs; some 40 minutes
	$(BIN)/python -m olmo2_export.bench stages
	$(BIN)/python -m olmo2_export.bench quality
	$(BIN)/python -m olmo2_export.bench cpu

REQUESTS ?= 10000

bench-serve: $(STAMP) ## clients of the server: throughput, waits, a soak of REQUESTS requests; beside llama-server if make peers built it
	$(BIN)/python -m olmo2_export.bench serve --size demo --requests $(REQUESTS)
	$(BIN)/python -m olmo2_export.bench serve --size 1B --requests $$(( $(REQUESTS) / 50 ))

# The runner's tests that need neither torch nor the exporter, on packages that the exporter has made before.
RUNNER_TESTS := $(patsubst %,tests/runner/%.py,test_runtimes_imports test_threads test_run_cli ort/test_ort_runner \
  text/test_sampling text/test_tokenizer text/test_plain_text)
PYTHONS      ?= 3.12 3.13

test-pythons: $(STAMP) ## the runner's tests on other Pythons, without torch (PYTHONS="3.12 3.13", on PATH or in pyenv)
	rm -rf build/packages && PYTHONPATH=tests $(BIN)/python tests/support/packages.py build/packages
	@set -e; for v in $(PYTHONS); do \
	python=$$(ls "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$v.*/bin/python 2>/dev/null | tail -n 1); \
	python=$${python:-$$(command -v python$$v || true)}; \
	[ -n "$$python" ] || { echo "no Python $$v on PATH or in pyenv"; exit 1; }; \
	"$$python" -m venv --clear $(VENV)-$$v && echo '*' > $(VENV)-$$v/.gitignore; \
	$(VENV)-$$v/bin/$(PIP) numpy tokenizers onnxruntime cuda-bindings pytest starlette uvicorn httptools prometheus-client llguidance \
	  opentelemetry-sdk opentelemetry-exporter-otlp-proto-http; \
	PYTHONPATH=. $(VENV)-$$v/bin/python -m pytest -q -p no:cacheprovider --packages build/packages $(RUNNER_TESTS); \
	done

# Their packages bring other versions of onnxruntime and transformers: a venv each, and a folder for Node's.
INTEROP := $(addprefix $(VENV)-peers-,genai/.installed optimum/.installed) build/interop/.installed

test-interop: $(STAMP) $(INTEROP) ## onnxruntime-genai, optimum and transformers.js on packages of q4, q8 and fp32; installs them
	$(BIN)/python -m pytest -q tests/interop/other_runtimes.py

build/interop/.installed: Makefile
	mkdir -p $(@D)
	cd $(@D) && ONNXRUNTIME_NODE_INSTALL=skip npm install --silent --no-save --prefix . @huggingface/transformers@4.3.2
	@touch $@

AXE := build/page/node_modules/axe-core/axe.min.js

test-page: $(STAMP) $(AXE) ## the server's page in Chromium, with axe-core, which it installs; pictures in build/page
	AXE=$(AXE) PICTURES=build/page $(BIN)/python -m pytest -q tests/runner/serve/test_page.py

$(AXE): Makefile
	mkdir -p build/page
	cd build/page && npm install --silent --no-save --prefix . axe-core@4.14.1
	@touch $@

# transformers imports torchao where it is there, in every process: 1 s, and two warnings. A venv that sees .venv's libraries has it.
test-quantised: $(VENV)-quantised/.installed ## quantised checkpoints through the libraries that made them; installs these, 46 MB
	$(VENV)-quantised/bin/python -m pytest -q -k "library_of_today or compressed_tensors_itself" \
	tests/exporter/package/test_imported.py tests/exporter/weights/test_quantized.py

$(VENV)-quantised/.installed: $(STAMP) Makefile
	$(PYTHON) -m venv --clear $(@D) && echo '*' > $(@D)/.gitignore
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$(echo $(@D)/lib/python3*/site-packages)/libraries.pth
	$(@D)/bin/$(PIP) --no-deps torchao==0.18.0 bitsandbytes==0.50.2 compressed-tensors==0.20.0 loguru==0.7.3
	@touch $@

test-oldest: ## an export and its verification with the oldest versions of constraints-oldest.txt
	$(PYTHON) -m venv --clear $(VENV)-oldest && echo '*' > $(VENV)-oldest/.gitignore
	$(VENV)-oldest/bin/pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt torch
	$(VENV)-oldest/bin/pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt '.[export]'
	$(VENV)-oldest/bin/olmo2-export export demo --out build/oldest --force --variant fp32 --variant q4
	$(VENV)-oldest/bin/olmo2-export verify build/oldest --reference demo --longest 256

gpu-test: $(VENV)-gpu/.installed ## the rows of tests/gpu/CHECKLIST.md that this machine's GPU allows; skips say why
	$(VENV)-gpu/bin/python -m pytest -q -o filterwarnings=default --tb=short --show-capture=no tests/gpu/gpu_*.py $${ROW:+-k "$$ROW"}

# A venv of its own, with full TensorRT if TENSORRT=1: onnxruntime-gpu takes the place of onnxruntime. torch brings CUDA, unless pip is told otherwise.
$(VENV)-gpu/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D) && echo '*' > $(@D)/.gitignore
	$(@D)/bin/$(PIP) torch
	$(@D)/bin/$(PIP) --editable '.[dev]'
	$(@D)/bin/pip uninstall --quiet --yes onnxruntime
	$(@D)/bin/$(PIP) onnxruntime-gpu==1.31.1
	$(@D)/bin/$(PIP) --no-deps onnxruntime-ep-nv-tensorrt-rtx-cu13
	$(if $(TENSORRT),$(@D)/bin/$(PIP) tensorrt --extra-index-url https://pypi.nvidia.com)
	@touch $@

peers: $(addprefix $(VENV)-peers-,$(addsuffix /.installed,llama genai optimum openvino)) ## what make bench compares with; compiles llama.cpp

# llama.cpp as llama-cpp-python ships it, compiled once for its library and its server, in two jobs: one per core takes the memory of all.
# With AMX it dies of SIGSEGV when it loads a model: gcc is told to use all that this processor has but that.
LLAMA       := 0.3.36
CPUINFO     := /proc/cpuinfo
AMX         := $(shell grep -swq amx_int8 $(CPUINFO) && echo yes)
LLAMA_FLAGS := $(if $(AMX),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
LLAMA_CMAKE := -DCMAKE_BUILD_TYPE=Release -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON '-DCMAKE_INSTALL_RPATH=$$ORIGIN' \
  '-DCMAKE_C_FLAGS=$(LLAMA_FLAGS)' '-DCMAKE_CXX_FLAGS=$(LLAMA_FLAGS)' -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF

# A venv each, which git and ruff are told to ignore, because the peers pin other versions than we do.
$(VENV)-peers-llama/.installed: constraints.txt Makefile
	$(PYTHON) -m venv $(@D) && echo '*' > $(@D)/.gitignore
	$(@D)/bin/$(PIP) cmake ninja gguf==0.19.0
	$(@D)/bin/pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python --dest build/peers llama-cpp-python==$(LLAMA)
	tar -xzf build/peers/llama_cpp_python-$(LLAMA).tar.gz -C build/peers
	$(if $(AMX),@echo "This processor has AMX: llama.cpp is built without$(COMMA) because with it it dies of SIGSEGV.")
	PATH="$(CURDIR)/$(@D)/bin:$$PATH" && cd build/peers && \
	cmake -G Ninja -S llama_cpp_python-$(LLAMA)/vendor/llama.cpp -B llama.cpp $(LLAMA_CMAKE) >cmake.log && \
	cmake --build llama.cpp --target llama-server --parallel 2 >>cmake.log
	CMAKE_ARGS=-DLLAMA_BUILD=OFF $(@D)/bin/$(PIP) build/peers/llama_cpp_python-$(LLAMA)
	lib=$$(echo $(@D)/lib/python3*/site-packages/llama_cpp)/lib && mkdir -p $$lib && \
	cp -P build/peers/llama.cpp/bin/lib*.so* build/peers/llama.cpp/bin/llama-server $$lib && ln -sf ../$${lib#*/}/llama-server $(@D)/bin
	@touch $@

# What optimum-intel allows, not the versions of constraints.txt. Nobody wants its torchvision, and that of another build of torch breaks transformers.
$(VENV)-peers-openvino/.installed: constraints.txt
	$(PYTHON) -m venv $(@D) && echo '*' > $(@D)/.gitignore
	$(@D)/bin/$(PIP) torch
	$(@D)/bin/pip install --quiet --disable-pip-version-check openvino-genai==2026.4.1.0 optimum-intel==2.2.0 torch==2.13.0
	$(@D)/bin/pip uninstall --quiet --yes torchvision
	@touch $@

$(VENV)-peers-genai/.installed: constraints.txt
	$(PYTHON) -m venv $(@D) && echo '*' > $(@D)/.gitignore
	$(@D)/bin/$(PIP) torch
	$(@D)/bin/$(PIP) onnxruntime-genai==0.18.0 onnxruntime onnx onnx-ir transformers tqdm
	@touch $@

# transformers 4 is what optimum-onnx allows: not the versions of constraints.txt
$(VENV)-peers-optimum/.installed: constraints.txt
	$(PYTHON) -m venv $(@D) && echo '*' > $(@D)/.gitignore
	$(@D)/bin/$(PIP) torch
	$(@D)/bin/pip install --quiet --disable-pip-version-check optimum-onnx==0.1.0 optimum==2.1.0 transformers==4.57.6 onnxruntime==1.31.1 onnx==1.23.2 torch==2.13.0
	@touch $@

clean: ## remove .venv, packages and caches
	rm -rf $(VENV) $(VENV)-gpu $(VENV)-oldest $(VENV)-quantised $(VENV)-3.* $(VENV)-peers-* packages .pytest_cache .mypy_cache .ruff_cache *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

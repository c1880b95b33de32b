"""What the server of rank processes imports, once for all ranks and all restarts.

Enters: nothing.  Leaves: the modules of training in memory, those too that a run would import late.
Promises: no thread and no device is in use afterwards: the process can be forked.
"""

# ruff: noqa: E402, F401 - imported for those who are forked from here, in an environment made for it.
import contextlib
import io

from dist_lm import garbage
from dist_lm.worker import prepare_environment

garbage.collect_seldom()
prepare_environment()

# Every optimizer of torch imports it when it is made.
import torch._dynamo
import torch.utils.cpp_extension
import torch.utils.tensorboard

# Most of it is what all models share.
import transformers.models.bert.modeling_bert
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

import dist_lm.train
from dist_lm import driven, ops
from dist_lm.data.shards import load_webdataset

driven.import_without_compiler()
load_webdataset()
if ops.is_built():
    # Once for all ranks: a rank that is killed while it loads the op leaves a lock behind.
    with contextlib.redirect_stdout(io.StringIO()):
        ShareMemCommBuilder().load(verbose=False)
garbage.keep_all()

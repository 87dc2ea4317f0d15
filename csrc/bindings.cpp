// Registers every kernel under its op's name. The schemas are Python's (meft_kernels/ops/schemas.py).

#include <torch/library.h>

#include "kernels.h"

TORCH_LIBRARY_IMPL(meft_csrc, CPU, library) {
  library.impl("row_statistics", &meft::row_statistics);
  library.impl("norm_linear", &meft::norm_linear);
  library.impl("norm_linear_bwd", &meft::norm_linear_bwd);
  library.impl("adapter", &meft::adapter);
  library.impl("adapter_bwd", &meft::adapter_bwd);
  library.impl("ladder", &meft::ladder);
  library.impl("ladder_bwd", &meft::ladder_bwd);
  library.impl("ladder_keeping", &meft::ladder_keeping);
  library.impl("ladder_keeping_bwd", &meft::ladder_keeping_bwd);
  library.impl("pooled_upsample", &meft::pooled_upsample);
  library.impl("pooled_upsample_bwd", &meft::pooled_upsample_bwd);
  library.impl("gated_down", &meft::gated_down);
  library.impl("gated_down_bwd", &meft::gated_down_bwd);
  library.impl("gated_down_keeping", &meft::gated_down_keeping);
  library.impl("gated_down_keeping_bwd", &meft::gated_down_keeping_bwd);
  library.impl("gated_up", &meft::gated_up);
  library.impl("gated_up_bwd", &meft::gated_up_bwd);
  library.impl("guidance", &meft::guidance);
  library.impl("guidance_bwd", &meft::guidance_bwd);
  library.impl("relu_attention", &meft::relu_attention);
  library.impl("relu_attention_bwd", &meft::relu_attention_bwd);
  library.impl("relu_attention_pooled", &meft::relu_attention_pooled);
  library.impl("relu_attention_pooled_bwd", &meft::relu_attention_pooled_bwd);
  library.impl("linear_attention", &meft::linear_attention);
  library.impl("linear_attention_bwd", &meft::linear_attention_bwd);
  library.impl("self_attention", &meft::self_attention);
  library.impl("self_attention_bwd", &meft::self_attention_bwd);
  library.impl("int8_linear", &meft::int8_linear);
}

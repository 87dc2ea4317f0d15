// The C++ kernels of every op, as csrc/bindings.cpp registers them. Names, arguments and order are those of
// the op's schema in meft_kernels/ops/schemas.py; mathematics and shapes stand in meft_kernels/reference/<op>.py.
//
// Activations are fp32, bf16 or fp16 with at least one element, of any strides; parameters are of any
// floating type. A backward returns the gradients of the differentiable arguments in order, each in the type
// of its argument; x's is empty unless `need_x`. Those called `keeping` have the same op's arguments; the
// forward also returns the projection (..., r) of x in fp32, and the backward takes it in place of computing
// it again.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace meft {

std::tuple<at::Tensor, at::Tensor> row_statistics(const at::Tensor& x);

at::Tensor norm_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                       const at::Tensor& mean, const at::Tensor& rstd);
std::vector<at::Tensor> norm_linear_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                        const at::Tensor& bias, const at::Tensor& mean,
                                        const at::Tensor& rstd, bool need_x);

at::Tensor adapter(const at::Tensor& x, const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                   const at::Tensor& weight_1, const at::Tensor& bias_1, const at::Tensor& weight_2,
                   const at::Tensor& bias_2);
std::vector<at::Tensor> adapter_bwd(const at::Tensor& grad, const at::Tensor& x,
                                    const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                                    const at::Tensor& weight_1, const at::Tensor& bias_1,
                                    const at::Tensor& weight_2, const at::Tensor& bias_2, bool need_x);

at::Tensor ladder(const at::Tensor& x, const at::Tensor& state, const at::Tensor& weight,
                  const at::Tensor& bias, const at::Tensor& mean, const at::Tensor& rstd,
                  const at::Tensor& gate, const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                  const at::Tensor& weight_1, const at::Tensor& bias_1, const at::Tensor& weight_2,
                  const at::Tensor& bias_2);
std::vector<at::Tensor> ladder_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& state,
                                   const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& mean,
                                   const at::Tensor& rstd, const at::Tensor& gate,
                                   const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                                   const at::Tensor& weight_1, const at::Tensor& bias_1,
                                   const at::Tensor& weight_2, const at::Tensor& bias_2, bool need_x);

std::tuple<at::Tensor, at::Tensor> ladder_keeping(
    const at::Tensor& x, const at::Tensor& state, const at::Tensor& weight, const at::Tensor& bias,
    const at::Tensor& mean, const at::Tensor& rstd, const at::Tensor& gate, const at::Tensor& norm_weight,
    const at::Tensor& norm_bias, const at::Tensor& weight_1, const at::Tensor& bias_1,
    const at::Tensor& weight_2, const at::Tensor& bias_2);
std::vector<at::Tensor> ladder_keeping_bwd(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& state, const at::Tensor& weight,
    const at::Tensor& bias, const at::Tensor& mean, const at::Tensor& rstd, const at::Tensor& gate,
    const at::Tensor& norm_weight, const at::Tensor& norm_bias, const at::Tensor& weight_1,
    const at::Tensor& bias_1, const at::Tensor& weight_2, const at::Tensor& bias_2, bool need_x,
    const at::Tensor& down);

at::Tensor pooled_upsample(const at::Tensor& x, const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                           const at::Tensor& weight, const at::Tensor& bias,
                           const at::Tensor& out_norm_weight, const at::Tensor& out_norm_bias,
                           const std::optional<at::Tensor>& lengths, bool relu);
std::vector<at::Tensor> pooled_upsample_bwd(const at::Tensor& grad, const at::Tensor& x,
                                            const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                                            const at::Tensor& weight, const at::Tensor& bias,
                                            const at::Tensor& out_norm_weight,
                                            const at::Tensor& out_norm_bias,
                                            const std::optional<at::Tensor>& lengths, bool relu, bool need_x);

at::Tensor relu_attention(const at::Tensor& anchor, const at::Tensor& gate_weight,
                          const at::Tensor& gate_bias, const std::optional<at::Tensor>& lengths,
                          at::TensorList features);
std::vector<at::Tensor> relu_attention_bwd(const at::Tensor& grad, const at::Tensor& anchor,
                                           const at::Tensor& gate_weight, const at::Tensor& gate_bias,
                                           const std::optional<at::Tensor>& lengths, at::TensorList features);
at::Tensor relu_attention_pooled(const at::Tensor& anchor, const at::Tensor& gate_weight,
                                 const at::Tensor& gate_bias, const std::optional<at::Tensor>& lengths,
                                 at::TensorList features, int64_t pool);
std::vector<at::Tensor> relu_attention_pooled_bwd(const at::Tensor& grad, const at::Tensor& anchor,
                                                  const at::Tensor& gate_weight, const at::Tensor& gate_bias,
                                                  const std::optional<at::Tensor>& lengths,
                                                  at::TensorList features, int64_t pool);

at::Tensor linear_attention(const at::Tensor& anchor, const at::Tensor& gate_weight,
                            const at::Tensor& gate_bias, const std::optional<at::Tensor>& lengths,
                            at::TensorList features);
std::vector<at::Tensor> linear_attention_bwd(const at::Tensor& grad, const at::Tensor& anchor,
                                             const at::Tensor& gate_weight, const at::Tensor& gate_bias,
                                             const std::optional<at::Tensor>& lengths, at::TensorList features);

at::Tensor gated_down(const at::Tensor& x, const at::Tensor& weight_1, const at::Tensor& bias_1,
                      const at::Tensor& weight_2, const at::Tensor& bias_2, const at::Tensor& weight_3,
                      const at::Tensor& bias_3);
std::vector<at::Tensor> gated_down_bwd(const at::Tensor& grad, const at::Tensor& x,
                                       const at::Tensor& weight_1, const at::Tensor& bias_1,
                                       const at::Tensor& weight_2, const at::Tensor& bias_2,
                                       const at::Tensor& weight_3, const at::Tensor& bias_3, bool need_x,
                                       const std::optional<at::Tensor>& active);

std::tuple<at::Tensor, at::Tensor> gated_down_keeping(const at::Tensor& x, const at::Tensor& weight_1,
                                                      const at::Tensor& bias_1, const at::Tensor& weight_2,
                                                      const at::Tensor& bias_2, const at::Tensor& weight_3,
                                                      const at::Tensor& bias_3);
std::vector<at::Tensor> gated_down_keeping_bwd(const at::Tensor& grad, const at::Tensor& x,
                                               const at::Tensor& weight_1, const at::Tensor& bias_1,
                                               const at::Tensor& weight_2, const at::Tensor& bias_2,
                                               const at::Tensor& weight_3, const at::Tensor& bias_3,
                                               bool need_x, const at::Tensor& hidden);

at::Tensor guidance(const at::Tensor& weight, const at::Tensor& bias, at::TensorList features);
std::vector<at::Tensor> guidance_bwd(const at::Tensor& grad, const at::Tensor& weight, const at::Tensor& bias,
                                     at::TensorList features);

at::Tensor gated_up(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight,
                    const at::Tensor& bias, const at::Tensor& gate);
std::vector<at::Tensor> gated_up_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& y,
                                     const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& gate,
                                     bool need_x);

// Not an op: PyTorch's softmax attention, (B, H, T, d) each, all fp32; `mask` (B or 1, 1, 1, T) is boolean.
// The forward, for a positive `scale`, also returns the log of every row's sum of exponentials (B, H, T).
std::tuple<at::Tensor, at::Tensor> self_attention(const at::Tensor& query, const at::Tensor& key,
                                                  const at::Tensor& value,
                                                  const std::optional<at::Tensor>& mask, double scale);
std::tuple<at::Tensor, at::Tensor, at::Tensor> self_attention_bwd(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& out, const at::Tensor& logsumexp, const std::optional<at::Tensor>& mask, double scale);

// Not an op: frozen linear layers held in int8, of rows (N, K) that are rounded once for all of them; codes
// (M, K) in int8, scales and totals (groups, M) in fp32 and biases (M,) of each layer.
std::vector<at::Tensor> int8_linear(const at::Tensor& x, at::TensorList codes, at::TensorList scales,
                                    at::TensorList totals,
                                    const c10::List<std::optional<at::Tensor>>& biases);

std::tuple<at::Tensor, at::Tensor, at::Tensor> encode(const at::Tensor& x, const at::Tensor& mean,
                                                      const at::Tensor& rstd);
at::Tensor decode(const at::Tensor& code, const at::Tensor& scale, const at::Tensor& shift,
                  const at::Tensor& like, const std::optional<at::Tensor>& mean,
                  const std::optional<at::Tensor>& rstd);

}  // namespace meft

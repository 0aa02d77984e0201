// vocab_topk for few rows: checks its arguments and launches the parts of the vocabulary, then the rows.
#include <optional>
#include <tuple>

#include "tensors.h"
#include "vocab_topk_kernel.h"

namespace mlmfast::cuda {
namespace {

const char* const OP = "vocab_topk";

template <int NT, class T>
__global__ void __launch_bounds__(TOPK_THREADS, 2) topk_parts_of(VocabTopk a) {
  extern __shared__ __align__(16) char memory[];
  topk_part<NT, T>(a, blockIdx.x, memory);
}

__global__ void __launch_bounds__(TOPK_THREADS) topk_rows(VocabTopk a) {
  extern __shared__ __align__(16) char memory[];
  topk_row(a, blockIdx.x, memory);
}

template <int NT, class T>
void launch(const VocabTopk& a, cudaStream_t stream) {
  topk_parts_of<NT, T><<<a.parts, TOPK_THREADS, TopkLayout<NT>::BYTES, stream>>>(a);
}

template <class T>
void launch(const VocabTopk& a, cudaStream_t stream) {
  a.rows <= 8 ? launch<1, T>(a, stream) : a.rows <= 16 ? launch<2, T>(a, stream) : launch<4, T>(a, stream);
}

}  // namespace

std::tuple<Tensor, Tensor> vocab_topk(const Tensor& hidden, const Tensor& vocabulary, const std::optional<Tensor>& bias,
                                      int64_t k, double temperature) {
  check_half(OP, hidden);
  STD_TORCH_CHECK(hidden.dim() == 2 && vocabulary.dim() == 2, OP, " takes hidden [R, d] and vocabulary [V, d]");
  check_pieces(OP, "hidden", hidden, hidden.size(1), hidden);
  check_pieces(OP, "vocabulary", vocabulary, hidden.size(1), hidden);
  VocabTopk a{};
  a.rows = check_int(OP, "rows", hidden.size(0), 0, FEW_ROWS), a.width = check_int(OP, "the width", hidden.size(1));
  a.tokens = check_int(OP, "tokens", vocabulary.size(0), 1);
  a.k = check_int(OP, "k", k, 1, a.tokens < MOST_BEST ? a.tokens : MOST_BEST);
  STD_TORCH_CHECK(temperature != 0, OP, ": the temperature divides, so it cannot be 0");
  a.bias = check_row(OP, "bias", bias, a.tokens, hidden);
  a.parts = topk_parts(a.tokens);
  a.inverse_temperature = static_cast<float>(1 / temperature);

  const int64_t rows = a.rows, parts = a.parts;
  Tensor logprobs = torch::stable::new_empty(hidden, {rows, k}, ScalarType::Float);
  Tensor best_ids = torch::stable::new_empty(hidden, {rows, k}, ScalarType::Long);
  if (rows == 0) return {logprobs, best_ids};
  Tensor values = torch::stable::new_empty(hidden, {rows, parts, k}, ScalarType::Float);
  Tensor ids = torch::stable::new_empty(hidden, {rows, parts, k}, ScalarType::Int);
  Tensor partitions = torch::stable::new_empty(hidden, {2, rows, parts}, ScalarType::Float);
  a.hidden = hidden.const_data_ptr(), a.vocabulary = vocabulary.const_data_ptr();
  a.hidden_row = hidden.stride(0), a.vocabulary_row = vocabulary.stride(0);
  a.values = values.mutable_data_ptr<float>(), a.ids = ids.mutable_data_ptr<int32_t>();
  a.peaks = partitions.mutable_data_ptr<float>(), a.totals = a.peaks + rows * parts;
  a.logprobs = logprobs.mutable_data_ptr<float>(), a.best_ids = best_ids.mutable_data_ptr<int64_t>();

  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  const cudaStream_t stream = current_stream(hidden);
  hidden.scalar_type() == ScalarType::BFloat16 ? launch<bfloat16>(a, stream) : launch<float16>(a, stream);
  check(OP, cudaGetLastError());
  topk_rows<<<a.rows, TOPK_THREADS, TopkRowLayout::BYTES, stream>>>(a);
  check(OP, cudaGetLastError());
  return {logprobs, best_ids};
}

}  // namespace mlmfast::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(mlmfast_cuda, m) {
  m.def("vocab_topk(Tensor hidden, Tensor vocabulary, Tensor? bias, int k, float temperature) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mlmfast_cuda, CUDA, m) { m.impl("vocab_topk", TORCH_BOX(&mlmfast::cuda::vocab_topk)); }

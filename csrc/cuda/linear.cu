// linear for few rows: checks its arguments and launches the kernel for as many rows.
#include <array>
#include <optional>
#include <string_view>

#include "linear_kernel.h"
#include "tensors.h"

namespace mlmfast::cuda {
namespace {

const char* const OP = "linear";
constexpr std::array<std::string_view, 6> ACTIVATIONS = {"none", "gelu", "gelu_tanh", "relu", "tanh", "geglu"};

template <int MT, int NT, class T>
__global__ void __launch_bounds__(512) linear_tiles(Linear a) {
  extern __shared__ __align__(16) char memory[];
  linear_tile<MT, NT, T>(a, blockIdx.x, memory);
}

template <int MT, int NT, class T>
void launch(const Linear& a, cudaStream_t stream) {
  const int warps = linear_warps(a.width, a.outputs), bytes = linear_bytes(warps, MT, NT);
  if (bytes > 48 << 10)  // what a launch may have without asking
    check(OP, cudaFuncSetAttribute(linear_tiles<MT, NT, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const unsigned tiles = (a.outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
  linear_tiles<MT, NT, T><<<tiles, 32 * warps, bytes, stream>>>(a);
  check(OP, cudaGetLastError());
}

template <int MT, class T>
void launch(const Linear& a, cudaStream_t stream) {
  a.rows <= 8 ? launch<MT, 1, T>(a, stream) : a.rows <= 16 ? launch<MT, 2, T>(a, stream) : launch<MT, 4, T>(a, stream);
}

template <class T>
void launch(const Linear& a, cudaStream_t stream) {
  a.activation == Activation::GEGLU ? launch<2, T>(a, stream) : launch<1, T>(a, stream);
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, std::string activation) {
  check_half(OP, x);
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, OP, " takes x [T, n] and weight [m, n]");
  check_pieces(OP, "x", x, x.size(1), x);
  check_pieces(OP, "weight", weight, x.size(1), x);
  Linear a{};
  int known = 0;
  while (known < 6 && ACTIVATIONS[known] != activation) ++known;
  STD_TORCH_CHECK(known < 6, OP, ": activation '", activation, "' is not known");
  a.activation = static_cast<Activation>(known);
  const bool gated = a.activation == Activation::GEGLU;
  STD_TORCH_CHECK(!gated || weight.size(0) % 2 == 0, OP, ": geglu needs an even number of outputs");
  a.rows = check_int(OP, "rows", x.size(0), 0, FEW_ROWS), a.width = check_int(OP, "the inner dimension", x.size(1));
  a.outputs = check_int(OP, "outputs", gated ? weight.size(0) / 2 : weight.size(0));
  a.bias = check_row(OP, "bias", bias, weight.size(0), x);
  Tensor out = torch::stable::new_empty(x, {x.size(0), a.outputs});
  if (out.numel() == 0) return out;
  a.x = x.const_data_ptr(), a.weight = weight.const_data_ptr(), a.out = out.mutable_data_ptr();
  a.x_row = x.stride(0), a.weight_row = weight.stride(0);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  x.scalar_type() == ScalarType::BFloat16 ? launch<bfloat16>(a, current_stream(x)) : launch<float16>(a, current_stream(x));
  return out;
}

}  // namespace mlmfast::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(mlmfast_cuda, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mlmfast_cuda, CUDA, m) { m.impl("linear", TORCH_BOX(&mlmfast::cuda::linear)); }

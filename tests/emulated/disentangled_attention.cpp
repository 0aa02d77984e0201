// The CUDA kernels of disentangled_attention run on the host, block after block: a C function for ctypes.
#include "../../csrc/cuda/disentangled_attention_kernel.h"

#include <cstdlib>

using namespace mlmfast::cuda;

namespace {

template <int D, class T>
void run(const Attention& a, int sequences, int heads, int rows, int max_queries, bool few) {
  std::vector<char> memory(few ? FewLayout<D>::BYTES : Layout<D>::BYTES, 0x7f);  // large numbers, NaN in float32
  if (few) {
    for (int row = 0; row < rows; ++row)
      for (int head = 0; head < heads; ++head)
        Block::run(THREADS, [&] { attend_few<D, T>(a, sequences, row, head, memory.data()); });
    return;
  }
  for (int sequence = 0; sequence < sequences; ++sequence)
    for (int head = 0; head < heads; ++head)
      for (int first = 0; first < max_queries; first += SIDE)
        Block::run(THREADS, [&] { attend_block<D, T>(a, sequence, head, first, memory.data()); });
}

template <class T>
int run(const Attention& a, int sequences, int heads, int rows, int max_queries, bool few) {
  switch (a.width) {
    case 32: run<32, T>(a, sequences, heads, rows, max_queries, few); return 0;
    case 64: run<64, T>(a, sequences, heads, rows, max_queries, few); return 0;
    case 128: run<128, T>(a, sequences, heads, rows, max_queries, few); return 0;
  }
  return 1;
}

}  // namespace

extern "C" int disentangled_attention(const Attention* a, int sequences, int heads, int rows, int max_queries, int few,
                                      int half) {
  return half ? run<float16>(*a, sequences, heads, rows, max_queries, few)
              : run<bfloat16>(*a, sequences, heads, rows, max_queries, few);
}

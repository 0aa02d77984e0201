// A product of few rows: 16 rows of weights at a time against up to 32 rows of x, on the tensor cores.
//
// It costs what it takes to read the weights, once, so everything is about having enough of them under way. Weights are the
// left operand (16 rows of them fill it) and x the right one, whose 8 columns are 8 rows of x. A product's inner dimension
// may be taken in any order if both operands take the same one; in the order chosen here what a lane needs for two
// instructions are 8 neighbours of a row, one load of 16 bytes. So weights go from memory to registers and to the tensor
// cores, with no shared memory and no barrier between: a warp has only its own loads to wait for.
//
// Of an H200 one expects 4.8 TB/s with some 0.8 us from asking to having: 3.8 MB under way, 30 KB a multiprocessor, and
// as much again to spare. A warp keeps DEPTH pieces of 1 KB under way, at every moment (a piece is asked for anew as soon as
// it is multiplied), and a multiprocessor holds 16 warps of at most 128 registers: 64 KB up to 16 rows, 32 KB beyond, where
// x takes the registers. x is the same for all warps of a multiprocessor and stays in its first-level cache, so fewer of
// its pieces need be under way.
#pragma once

#include "device.h"

namespace mlmfast::cuda {

constexpr int FEW_ROWS = 32;  // of x
constexpr int STEP = 32;      // numbers of the inner dimension in a piece: 64 bytes a row

// What a warp multiplies: 16 rows of weights from each of MT places with 8 NT rows of x. Registers are short, so the lane's
// other rows are given by how far they are.
template <int MT, int NT, class T>
struct Operands {
  const T* weights[MT];                // the lane's next eight numbers of row g of each place
  const T* x;                          // and of row g of x
  int32_t weights_step, x_step;        // from a row to the eighth after it, in numbers
  int32_t weights_below, x_below;      // rows that there are from row g on; others are taken for zeros
  int32_t left;                        // numbers that there are from this lane's on
};

// What is under way: DEPTH pieces of weights, the first NEAR of x; as many as 128 registers hold beside the sums.
template <int MT, int NT>
struct Ring {
  static constexpr int DEPTH = NT == 4 ? 2 : MT * NT < 4 ? 4 : 3;
  static constexpr int NEAR = NT == 1 ? 4 : MT == 1 && NT == 4 ? 2 : 1;
  static_assert(DEPTH % NEAR == 0);
  uint32_t weights[DEPTH][MT][2][4];
  uint32_t x[NEAR][NT][4];
};

// Operands of this lane over [begin, end) of the inner dimension. `weights` are where the MT places begin, `x` where x does;
// `weight_rows` and `x_rows` say how many rows there are.
template <int MT, int NT, class T>
MLMFAST_DEVICE Operands<MT, NT, T> operands(const T* const (&weights)[MT], int64_t weight_row, int weight_rows, const T* x,
                                            int64_t x_row, int x_rows, int begin, int end) {
  Operands<MT, NT, T> o;
  const int g = thread() % 32 / 4, first = begin + thread() % 4 * 8;
#pragma unroll
  for (int mt = 0; mt < MT; ++mt) o.weights[mt] = weights[mt] + g * weight_row + first;
  o.x = x + g * x_row + first;
  o.weights_step = static_cast<int32_t>(8 * weight_row), o.x_step = static_cast<int32_t>(8 * x_row);
  o.weights_below = weight_rows - g, o.x_below = x_rows - g;
  o.left = end - first;
  return o;
}

// Asks for a piece of weights, or of x, some numbers after the place that the operands have come to. A lane's eight numbers
// are there or not: widths are multiples of 8.
template <int MT, int NT, class T>
MLMFAST_DEVICE void ask_weights(Ring<MT, NT>& ring, int slot, const Operands<MT, NT, T>& o, int after) {
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      load_once(ring.weights[slot][mt][half], o.weights[mt] + half * o.weights_step + after,
                after < o.left && 8 * half < o.weights_below);
}

template <int MT, int NT, class T>
MLMFAST_DEVICE void ask_x(Ring<MT, NT>& ring, int slot, const Operands<MT, NT, T>& o, int after) {
#pragma unroll
  for (int nt = 0; nt < NT; ++nt)
    load_again(ring.x[slot][nt], o.x + nt * o.x_step + after, after < o.left && 8 * nt < o.x_below);
}

// Asks for the first pieces of weights, and of x.
template <int MT, int NT, class T>
MLMFAST_DEVICE void fill_weights(Ring<MT, NT>& ring, const Operands<MT, NT, T>& o) {
#pragma unroll
  for (int slot = 0; slot < Ring<MT, NT>::DEPTH; ++slot) ask_weights(ring, slot, o, slot * STEP);
}
template <int MT, int NT, class T>
MLMFAST_DEVICE void fill_x(Ring<MT, NT>& ring, const Operands<MT, NT, T>& o) {
#pragma unroll
  for (int slot = 0; slot < Ring<MT, NT>::NEAR; ++slot) ask_x(ring, slot, o, slot * STEP);
}

// sums[mt][nt][e] += weight rows @ x rows.T over [begin, end), after both fills: e is of weight row g + e / 2 * 8 and of
// x row 8 nt + t + e % 2, as `multiply` has it. Pieces are added up in the order of the inner dimension, whatever NT.
template <int MT, int NT, class T>
MLMFAST_DEVICE void multiply_few(float (&sums)[MT][NT][4], Ring<MT, NT>& ring, Operands<MT, NT, T>& o) {
  constexpr int DEPTH = Ring<MT, NT>::DEPTH, NEAR = Ring<MT, NT>::NEAR;
  for (int pieces = (o.left + thread() % 4 * 8 + STEP - 1) / STEP; pieces > 0; pieces -= DEPTH) {
#pragma unroll
    for (int slot = 0; slot < DEPTH; ++slot) {
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
        const uint32_t(&low)[4] = ring.weights[slot][mt][0], (&high)[4] = ring.weights[slot][mt][1];
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          const uint32_t(&x)[4] = ring.x[slot % NEAR][nt];
          multiply<T>(sums[mt][nt], {low[0], high[0], low[1], high[1]}, {x[0], x[1]});
          multiply<T>(sums[mt][nt], {low[2], high[2], low[3], high[3]}, {x[2], x[3]});
        }
      }
      ask_weights(ring, slot, o, (slot + DEPTH) * STEP);
      ask_x(ring, slot % NEAR, o, (slot + NEAR) * STEP);
    }
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) o.weights[mt] += DEPTH * STEP;
    o.x += DEPTH * STEP, o.left -= DEPTH * STEP;
  }
}

}  // namespace mlmfast::cuda

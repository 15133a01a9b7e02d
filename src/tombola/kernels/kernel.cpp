// Sparse passes over batches of feature maps, compiled once per instruction set (see kernel.hpp).
//
// A weight that survives multiplies the same pixel of every sample, so the samples lie side by side
// in vectors: a few pixels of a block of samples fill eight accumulators, and each tap then costs
// one broadcast, one offset and eight multiply-adds. A linear layer is the case of one pixel.
#include "kernel.hpp"

#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef TOMBOLA_ISA
#define TOMBOLA_ISA plain
#endif
#define TOMBOLA_QUOTE(name) #name
#define TOMBOLA_NAME(name) TOMBOLA_QUOTE(name)

#ifndef TOMBOLA_LANES
#if defined(__AVX512F__)
#define TOMBOLA_LANES 16
#elif defined(__AVX2__)
#define TOMBOLA_LANES 8
#else
#define TOMBOLA_LANES 4
#endif
#endif

namespace tombola {
namespace {

constexpr int L = TOMBOLA_LANES;
constexpr int conv_vectors = 2, conv_pixels = 4;  // linear_vectors are of 1 pixel
constexpr int most_pixels = L < 16 ? conv_pixels : 8;  // of packed images, for gradients of weights: AVX-512 has the registers

typedef float vec __attribute__((vector_size(4 * L)));
typedef float unaligned __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef float anywhere __attribute__((vector_size(4 * L), aligned(1), may_alias));  // std::memcpy would be two halves
typedef float vec4 __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(4 * L), may_alias));

constexpr bool little_endian = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;

inline vec load(const float* p) { return *reinterpret_cast<const unaligned*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<unaligned*>(p) = v; }

struct Vectors {
    vec at[4];
};

// Neighbouring groups of G lanes are swapped between a and b: (a0 b0 a2 b2 ..) and (a1 b1 a3 b3 ..).
#if TOMBOLA_LANES == 4
#define TOMBOLA_LANE_LIST(f) f(0), f(1), f(2), f(3)
#elif TOMBOLA_LANES == 8
#define TOMBOLA_LANE_LIST(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)
#else
#define TOMBOLA_LANE_LIST(f) \
    f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#endif
template <int G>
inline vec evens(vec a, vec b) {
#define TOMBOLA_EVEN(i) ((i) & G ? L + ((i) ^ G) : (i))
    return __builtin_shufflevector(a, b, TOMBOLA_LANE_LIST(TOMBOLA_EVEN));
}
template <int G>
inline vec odds(vec a, vec b) {
#define TOMBOLA_ODD(i) ((i) & G ? L + (i) : ((i) | G))
    return __builtin_shufflevector(a, b, TOMBOLA_LANE_LIST(TOMBOLA_ODD));
}

template <int G = L / 2>
inline void transpose(vec (&rows)[L]) {
    for (int i = 0; i < L; ++i)
        if (!(i & G)) {
            const vec a = rows[i], b = rows[i | G];
            rows[i] = evens<G>(a, b);
            rows[i | G] = odds<G>(a, b);
        }
    if constexpr (G > 1) transpose<G / 2>(rows);
}

// (a0 b0 a1 b1 ..) + (a2 b2 a3 b3 ..): what evens + odds of single lanes would do, in half the shuffles.
inline vec sum_halves(vec a, vec b) {
#define TOMBOLA_LOW(i) (((i) & 1 ? L : 0) + (((i) & ~3) | ((i) >> 1 & 1)))
#define TOMBOLA_HIGH(i) (TOMBOLA_LOW(i) + 2)
    return __builtin_shufflevector(a, b, TOMBOLA_LANE_LIST(TOMBOLA_LOW)) +
           __builtin_shufflevector(a, b, TOMBOLA_LANE_LIST(TOMBOLA_HIGH));
}

// Lane i of the result is the sum of the lanes of vector first + i, for i < 2 G at G = L / 2; four(i) are vectors i to i + 3.
template <int G, class Four>
inline vec sums(const Four& four, int first) {
    if constexpr (G == 2) {
        const auto v = four(first);
        const vec a = sum_halves(v.at[0], v.at[1]), b = sum_halves(v.at[2], v.at[3]);
        return evens<G>(a, b) + odds<G>(a, b);
    } else {
        const vec a = sums<G / 2>(four, first), b = sums<G / 2>(four, first + G);
        return evens<G>(a, b) + odds<G>(a, b);
    }
}

// The sums of the lanes of each of four vectors a to d, in order, given sum_halves(a, b) and sum_halves(c, d).
inline vec4 sum_quarters(vec ab, vec cd) {
    const vec all = evens<2>(ab, cd) + odds<2>(ab, cd);
#if TOMBOLA_LANES == 16
    typedef float vec8 __attribute__((vector_size(32)));
    const vec8 half = __builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif TOMBOLA_LANES == 8
    return __builtin_shufflevector(all, all, 0, 1, 2, 3) + __builtin_shufflevector(all, all, 4, 5, 6, 7);
#else
    return all;
#endif
}

inline void add_four(float* to, vec4 more) {
    vec4 all;
    std::memcpy(&all, to, sizeof all);
    all += more;
    std::memcpy(to, &all, sizeof all);
}

// Keeps a compiler from reading a vector from memory again for its second use, since loads limit the products.
inline void read_once([[maybe_unused]] vec& v) {
#if defined(__AVX512F__) && TOMBOLA_LANES == 16
    asm("" : "+v"(v));
#elif defined(__AVX2__) && TOMBOLA_LANES == 8
    asm("" : "+x"(v));
#endif
}

inline float sum(vec v) {
    float total = 0;
    for (int i = 0; i < L; ++i) total += v[i];
    return total;
}

inline int at_most(int a, int b) { return a < b ? a : b; }

// Copies `count` vectors along the samples: to[m * to_step + s] = from[s * sample + m].
void pack_transposed(const float* from, ptrdiff_t sample, int samples, int block, int count, float* to,
                     ptrdiff_t to_step) {
    for (int s = 0; s < block; s += L) {
        int m = 0;
        for (; m + L <= count; m += L) {
            vec rows[L];
            for (int i = 0; i < L; ++i) rows[i] = s + i < samples ? load(from + (s + i) * sample + m) : vec{};
            transpose(rows);
            for (int i = 0; i < L; ++i) store(to + (m + i) * to_step + s, rows[i]);
        }
        for (; m < count; ++m)
            for (int i = 0; i < L; ++i) to[m * to_step + s + i] = s + i < samples ? from[(s + i) * sample + m] : 0.f;
    }
}

// Packs a box of the view as (channel, row, column, block), zero outside of the view's image and
// beyond its last sample. Packed channels lie `channel` apart.
void pack(View from, int height, int width, int samples, int block, int channels, int top, int rows, int left,
          int columns, float* to, ptrdiff_t channel) {
    const int first = left < 0 ? -left : 0, last = at_most(columns, width - left);
    const bool by_row = from.n != 1 && from.w == 1 && width > 1, by_channel = from.n != 1 && !by_row && from.c == 1;
    if (by_channel || last - first < columns) std::memset(to, 0, sizeof(float) * channels * channel);
    for (int y = 0; y < rows; ++y) {
        const bool inside = 0 <= top + y && top + y < height;
        for (int c = 0; c < channels; ++c) {
            float* out = to + c * channel + ptrdiff_t(y) * columns * block;
            const float* in = from.data + c * from.c + (top + y) * from.h + left * from.w;
            if (!inside) {
                std::memset(out, 0, sizeof(float) * columns * block);
            } else if (from.n == 1) {
                for (int x = first; x < last; ++x) {
                    if (samples == block) {
                        for (int s = 0; s < block; s += L) store(out + x * block + s, load(in + x * from.w + s));
                    } else {
                        std::memcpy(out + x * block, in + x * from.w, sizeof(float) * samples);
                        std::memset(out + x * block + samples, 0, sizeof(float) * (block - samples));
                    }
                }
            } else if (by_row) {
                pack_transposed(in + first, from.n, samples, block, last - first, out + first * block, block);
            } else if (by_channel) {
                for (int x = first; x < last; ++x)
                    pack_transposed(in + x * from.w, from.n, samples, block, channels, out + x * block, channel);
                break;
            } else {
                for (int x = first; x < last; ++x)
                    for (int s = 0; s < block; ++s)
                        out[x * block + s] = s < samples ? in[x * from.w + s * from.n] : 0.f;
            }
        }
    }
}

// Four neighbouring numbers again and again; and one of these in all lanes, by one shuffle.
inline vec repeat_four(const float* from) {
#if defined(__AVX512F__) && TOMBOLA_LANES == 16
    // The general code writes the four to memory, and waits until it can read sixteen there. All lanes are in the mask, without
    // which GCC warns of its own header.
    return (vec)_mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(from));
#elif defined(__AVX2__) && TOMBOLA_LANES == 8
    return (vec)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(from));  // a load; the general code is one and a shuffle
#else
    vec4 v;
    std::memcpy(&v, from, sizeof v);
#define TOMBOLA_REPEAT(i) (i) & 3
    return __builtin_shufflevector(v, v, TOMBOLA_LANE_LIST(TOMBOLA_REPEAT));
#endif
}
template <int I>
inline vec spread(vec fours) {
#define TOMBOLA_SAME(i) ((i) & ~3) + I
    return __builtin_shufflevector(fours, fours, TOMBOLA_LANE_LIST(TOMBOLA_SAME));
}

// Four neighbouring offsets, loaded two by two: a sum over taps is limited by the number of its loads.
struct FourOffsets {
    int32_t at[4];

    explicit FourOffsets(const int32_t* from) {
        for (int i = 0; i < 4; i += 2) {
            uint64_t pair;
            std::memcpy(&pair, from + i, sizeof pair);
            at[little_endian ? i : i + 1] = static_cast<int32_t>(pair);
            at[little_endian ? i + 1 : i] = static_cast<int32_t>(pair >> 32);
        }
    }
};

// Calls add(value in all lanes, offset) for each of `count` taps, in order.
template <class Add>
inline void each_tap(const float* values, const int32_t* offsets, int count, const Add& add) {
    int k = 0;
    for (; k + 4 <= count; k += 4) {
        const FourOffsets offset(offsets + k);
        const vec four = repeat_four(values + k);
        add(spread<0>(four), offset.at[0]);
        add(spread<1>(four), offset.at[1]);
        add(spread<2>(four), offset.at[2]);
        add(spread<3>(four), offset.at[3]);
    }
    for (; k < count; ++k) add(values[k] - vec{}, offsets[k]);
}

// P pixels of V vectors of samples: every row of the target, or every tap of every row.
template <int P, int V>
struct Tile {
    const Pass& pass;
    int tile, samples;
    ptrdiff_t line;  // from one pixel or feature of the source to the next
    const float* source[P];

    // Calls body(row, first tap, end, offsets of these taps). Numbers of the taps lie row by row, so that those of a tile are
    // pieces far apart, which a processor does not foresee: the next piece is fetched in time.
    template <class Body>
    void each_row(const float* numbers, const Body& body) const {
        const int32_t *split = pass.split + tile, *offset = pass.offset + pass.first_offset[tile];
        for (int r = 0; r < pass.rows; ++r) {
            const int begin = split[0], end = split[1];
            split += pass.tiles + 1;
            if (r + 1 < pass.rows)
                for (int k = split[0]; k < split[1] + 15; k += 16) __builtin_prefetch(numbers + k);
            body(r, begin, end, offset);
            offset += end - begin;
        }
    }

    void gather(const float* values, const float* bias, float* const (&target)[P], ptrdiff_t row) const {
        const bool whole = samples == V * L;
        each_row(values, [&](int r, int begin, int end, const int32_t* offset) {
            vec sum[P][V];
            if (tile && begin == end) return;
            for (int p = 0; p < P; ++p) {
                float partial[V * L];
                const float* from = target[p] + r * row;
                if (tile && !whole) from = static_cast<float*>(std::memcpy(partial, from, sizeof(float) * samples));
                for (int v = 0; v < V; ++v) sum[p][v] = tile ? load(from + v * L) : (bias ? bias[r] : 0.f) - vec{};
            }
            each_tap(values + begin, offset, end - begin, [&](vec value, ptrdiff_t place) {
                for (int p = 0; p < P; ++p)
                    for (int v = 0; v < V; ++v) sum[p][v] += value * load(source[p] + place * line + v * L);
            });
            for (int p = 0; p < P; ++p) {
                if (whole)
                    for (int v = 0; v < V; ++v) store(target[p] + r * row + v * L, sum[p][v]);
                else {
                    float all[V * L];  // not sum itself, which must stay in registers
                    for (int v = 0; v < V; ++v) store(all + v * L, sum[p][v]);
                    std::memcpy(target[p] + r * row, all, sizeof(float) * samples);
                }
            }
        });
    }

    // Four taps side by side, since the sum over the samples of one is a row of additions that wait for each other.
    void correlate(const float* const (&delta)[P], ptrdiff_t row, float* gradient) const {
        each_row(gradient, [&](int r, int begin, int end, const int32_t* offset) {
            vec d[P][V];
            if (begin == end) return;
            for (int p = 0; p < P; ++p)
                for (int v = 0; v < V; ++v) d[p][v] = load(delta[p] + r * row + v * L);
            const auto four = [&](int i) {
                ptrdiff_t place[4];
                Vectors total = {};
                for (int j = 0; j < 4; ++j) place[j] = offset[i + j] * line;
                for (int p = 0; p < P; ++p)
                    for (int v = 0; v < V; ++v)
                        for (int j = 0; j < 4; ++j) total.at[j] += d[p][v] * load(source[p] + place[j] + v * L);
                return total;
            };
            const auto product = [&](int i) {
                vec total = {};
                for (int p = 0; p < P; ++p)
                    for (int v = 0; v < V; ++v) total += d[p][v] * load(source[p] + offset[i] * line + v * L);
                return total;
            };
            float* const to = gradient + begin;
            const int count = end - begin;
            int i = 0;
            for (; i + L <= count; i += L) store(to + i, load(to + i) + sums<L / 2>(four, i));
            if constexpr (L < 16) {
                for (; i < count; ++i) to[i] += sum(product(i));
            } else if (i < count) {  // to add up sixteen lanes one by one would take as long as all other work
                const auto rest = [&](int k) {
                    Vectors total = {};
                    if (k + 4 <= count) return four(k);
                    for (int j = 0; k + j < count; ++j) total.at[j] = product(k + j);
                    return total;
                };
                const vec all = sums<L / 2>(rest, i);
                for (int k = 0; i + k < count; ++k) to[i + k] += all[k];
            }
        });
    }
};

inline int columns(const Pass& pass) { return (pass.grid_width - 1) * pass.source_step + pass.tap_width; }

// A source as the taps read it: the first line of a tile, and the distance between lines.
struct Lines {
    const float* first;
    ptrdiff_t step;
};

// Calls body(tile of P pixels, first pixel) for whole groups from pixel `first` on; returns the pixel after them.
template <int P, int V, class Body>
int pixels(const Pass& pass, int tile, int samples, Lines source, int first, int end, const Body& body) {
    for (; first + P <= end; first += P) {
        Tile<P, V> group{pass, tile, samples, source.step, {}};
        for (int p = 0; p < P; ++p) {
            const int y = (first + p) / pass.grid_width, x = (first + p) % pass.grid_width;
            group.source[p] = source.first + ptrdiff_t(y * columns(pass) + x) * pass.source_step * source.step;
        }
        body(group, first);
    }
    return first;
}

inline bool linear(const Pass& pass) { return pass.block == linear_vectors * L; }

template <class Body>
void groups(const Pass& pass, int tile, int samples, Lines source, int end, const Body& body) {
    if (!linear(pass)) {
        const int first = pixels<conv_pixels, conv_vectors>(pass, tile, samples, source, 0, end, body);
        pixels<1, conv_vectors>(pass, tile, samples, source, first, end, body);
    } else if (samples > 4 * L) {
        pixels<1, 8>(pass, tile, samples, source, 0, end, body);
    } else if (samples > 2 * L) {
        pixels<1, 4>(pass, tile, samples, source, 0, end, body);
    } else if (samples > L) {
        pixels<1, 2>(pass, tile, samples, source, 0, end, body);
    } else {
        pixels<1, 1>(pass, tile, samples, source, 0, end, body);
    }
}

// Whether whole blocks of samples lie side by side already, so that a linear layer can read them in place.
inline bool in_place(const Pass& pass, View from, int batch) {
    return from.packed || (linear(pass) && from.n == 1 && batch % pass.block == 0);
}

Lines lines(const Pass& pass, View source, int batch, int n, int y, int grid_rows, int tile, float* workspace) {
    const int channel = tile * pass.tile_channels;
    source.data += n / pass.block * source.blocks + channel * source.c;
    if (in_place(pass, source, batch)) return {source.data, source.c};
    pack(source, pass.height, pass.width, at_most(pass.block, batch - n), pass.block,
         at_most(pass.tile_channels, pass.channels - channel), y * pass.source_step - pass.pad_top,
         (grid_rows - 1) * pass.source_step + pass.tap_height, -pass.pad_left, columns(pass), workspace,
         ptrdiff_t((pass.band - 1) * pass.source_step + pass.tap_height) * columns(pass) * pass.block);
    return {workspace, pass.block};
}

void gather(const Pass& pass, const float* values, const float* bias, View source, int batch, Target target,
            float* workspace) {
    for (int y = 0; y < pass.grid_height; y += pass.band) {
        const int grid_rows = at_most(pass.band, pass.grid_height - y);
        for (int n = 0; n < batch; n += pass.block) {
            for (int tile = 0; tile < pass.tiles; ++tile) {
                const Lines from = lines(pass, source, batch, n, y, grid_rows, tile, workspace);
                const auto body = [&](const auto& group, int first) {
                    constexpr int P = sizeof(group.source) / sizeof(*group.source);
                    float* to[P];
                    for (int p = 0; p < P; ++p) {
                        const int i = y + (first + p) / pass.grid_width, j = (first + p) % pass.grid_width;
                        to[p] = target.data + n / pass.block * target.blocks +
                                (ptrdiff_t(i * pass.target_step + pass.target_top) * pass.target_width +
                                 j * pass.target_step + pass.target_left) * target.pixel;
                    }
                    group.gather(values, bias, to, target.row);
                };
                groups(pass, tile, at_most(pass.block, batch - n), from, grid_rows * pass.grid_width, body);
            }
        }
    }
}

void correlate(const Pass& pass, View source, View delta, int batch, float* gradient, float* bias_gradient,
               float* workspace) {
    const int block = pass.block;
    float* const packed =
        workspace ? workspace + ptrdiff_t(pass.rows) * pass.band * pass.grid_width * block : nullptr;
    const int32_t count_of_taps = pass.split[ptrdiff_t(pass.rows) * (pass.tiles + 1) - 1];
    if (count_of_taps) std::memset(gradient, 0, sizeof(float) * count_of_taps);
    if (bias_gradient) std::memset(bias_gradient, 0, sizeof(float) * pass.rows);
    for (int y = 0; y < pass.grid_height; y += pass.band) {
        const int grid_rows = at_most(pass.band, pass.grid_height - y), count = grid_rows * pass.grid_width;
        for (int n = 0; n < batch; n += block) {
            View d = delta;
            d.data += n / block * d.blocks;
            ptrdiff_t row = d.c;
            if (!in_place(pass, d, batch)) {
                row = ptrdiff_t(count) * block;
                pack(d, pass.grid_height, pass.grid_width, at_most(block, batch - n), block, pass.rows, y, grid_rows, 0,
                     pass.grid_width, workspace, row);
                d.data = workspace;
            }
            // What is read in place has nothing beyond the samples' vectors, not even zeros.
            const int lanes = count == 1 ? at_most(block, batch - n) : count * block;
            for (int r = 0; bias_gradient && r < pass.rows; ++r) {
                vec total = {};
                for (int i = 0; i < lanes; i += L) total += load(d.data + r * row + i);
                bias_gradient[r] += sum(total);
            }
            for (int tile = 0; tile < pass.tiles; ++tile) {
                const Lines from = lines(pass, source, batch, n, y, grid_rows, tile, packed);
                const auto body = [&](const auto& group, int first) {
                    constexpr int P = sizeof(group.source) / sizeof(*group.source);
                    const float* deltas[P];
                    for (int p = 0; p < P; ++p) deltas[p] = d.data + ptrdiff_t(first + p) * block;
                    group.correlate(deltas, row, gradient);
                };
                groups(pass, tile, at_most(block, batch - n), from, count, body);
            }
        }
    }
}

void pack_features(View from, int features, int batch, float* to) {
    constexpr int block = linear_vectors * L;
    for (int n = 0; n < batch; n += block, to += ptrdiff_t(features) * block) {
        View part = from;
        part.data += n * from.n;
        pack(part, 1, 1, at_most(block, batch - n), block, features, 0, 1, 0, 1, to, block);
    }
}

void unpack_features(const float* from, int features, int batch, View to) {
    constexpr int block = linear_vectors * L;
    for (int n = 0; n < batch; n += block)
        for (int f = 0; f < features; ++f, from += block)
            for (int s = 0; s < at_most(block, batch - n); ++s) to.data[(n + s) * to.n + f * to.c] = from[s];
}

void rectify(float* x, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; ++i) x[i] = x[i] < 0 ? 0 : x[i];
}

void gate(float* __restrict delta, const float* __restrict y, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; ++i) delta[i] = y[i] <= 0 ? 0 : delta[i];
}

struct Pair {
    vec a, b;
};

// Adds up the pairs that body(i, lanes) gives for the vectors from begin to end; the last may be short.
template <class Body>
void sum_pairs(ptrdiff_t begin, ptrdiff_t end, double& a, double& b, const Body& body) {
    constexpr int chains = 4;
    Pair total[chains] = {};
    ptrdiff_t i = begin;
    for (; i + chains * L <= end; i += chains * L)
        for (int c = 0; c < chains; ++c) {
            const Pair pair = body(i + c * L, L);
            total[c].a += pair.a;
            total[c].b += pair.b;
        }
    for (; i < end; i += L) {
        const Pair pair = body(i, end - i < L ? int(end - i) : L);
        total[0].a += pair.a;
        total[0].b += pair.b;
    }
    a += sum((total[0].a + total[1].a) + (total[2].a + total[3].a));
    b += sum((total[0].b + total[1].b) + (total[2].b + total[3].b));
}

inline vec load_first(const float* p, int lanes, float otherwise) {
    if (lanes == L) return load(p);
    vec v = otherwise - vec{};
    for (int i = 0; i < lanes; ++i) v[i] = p[i];
    return v;
}

inline void store_first(float* p, vec v, int lanes) {
    if (lanes == L) return store(p, v);
    for (int i = 0; i < lanes; ++i) p[i] = v[i];
}

constexpr ptrdiff_t chunk = 2048;  // fits the first cache

void batch_norm(const float* x, int channels, ptrdiff_t count, const float* weight, const float* bias, float epsilon,
               float* mean, float* variance, float* scale, float* y) {
    for (int c = 0; c < channels; ++c, x += count, y += count) {
        double center = 0, squares = 0;  // of all before the chunk: their mean, their squared deviations from it
        for (ptrdiff_t begin = 0; begin < count; begin += chunk) {
            const ptrdiff_t end = begin + chunk < count ? begin + chunk : count;
            double total = 0, deviations = 0, rest = 0;
            sum_pairs(begin, end, total, rest, [&](ptrdiff_t i, int lanes) {
                return Pair{load_first(x + i, lanes, 0.f), vec{}};
            });
            const double own = total / double(end - begin), step = own - center;
            const float near = float(own);
            sum_pairs(begin, end, deviations, rest, [&](ptrdiff_t i, int lanes) {
                const vec d = load_first(x + i, lanes, near) - near;
                return Pair{d * d, vec{}};
            });
            squares += deviations + step * step * double(begin) * double(end - begin) / double(end);
            center += step * double(end - begin) / double(end);
        }
        const double spread = squares / double(count);
        mean[c] = float(center);
        variance[c] = float(spread);
        scale[c] = float(1 / __builtin_sqrt(spread + epsilon));
        const float slope = scale[c] * weight[c], shift = bias[c], from = mean[c];
        for (ptrdiff_t i = 0; i < count; i += L) {
            const int lanes = count - i < L ? int(count - i) : L;
            store_first(y + i, (load_first(x + i, lanes, 0.f) - from) * slope + shift, lanes);
        }
    }
}

void batch_norm_gradient(const float* x, const float* delta, int channels, ptrdiff_t count, const float* weight,
                        const float* mean, const float* scale, float* gradient, float* weight_gradient,
                        float* bias_gradient) {
    for (int c = 0; c < channels; ++c, x += count, delta += count, gradient += count) {
        const float from = mean[c];
        double total = 0, product = 0;
        for (ptrdiff_t begin = 0; begin < count; begin += chunk)
            sum_pairs(begin, begin + chunk < count ? begin + chunk : count, total, product,
                      [&](ptrdiff_t i, int lanes) {
                          const vec d = load_first(delta + i, lanes, 0.f);
                          return Pair{d, d * (load_first(x + i, lanes, from) - from)};
                      });
        weight_gradient[c] = float(product * scale[c]);
        bias_gradient[c] = float(total);
        const float slope = weight[c] * scale[c], shift = float(total / double(count)),
                    pull = float(product / double(count) * scale[c] * scale[c]);
        for (ptrdiff_t i = 0; i < count; i += L) {
            const int lanes = count - i < L ? int(count - i) : L;
            const vec d = load_first(delta + i, lanes, 0.f), centered = load_first(x + i, lanes, 0.f) - from;
            store_first(gradient + i, (d - shift - centered * pull) * slope, lanes);
        }
    }
}

void normalise_images(const uint8_t* images, const int64_t* indices, ptrdiff_t count, int channels, ptrdiff_t pixels,
                      const float* mean, const float* scale, float* target) {
    constexpr ptrdiff_t ahead = 2;  // images: they lie anywhere in memory
    const ptrdiff_t size = channels * pixels;
    for (ptrdiff_t n = 0; n < count; ++n) {
        if (n + ahead < count)
            for (ptrdiff_t i = 0; i < size; i += 64) __builtin_prefetch(images + indices[n + ahead] * size + i);
        for (int c = 0; c < channels; ++c, target += pixels) {
            const uint8_t* __restrict from = images + indices[n] * size + c * pixels;
            float* __restrict to = target;
            const float center = mean[c], slope = scale[c];
            for (ptrdiff_t i = 0; i < pixels; ++i) to[i] = (float(from[i]) - center) * slope;
        }
    }
}

// Four pixels of a sample are one integer: transposed, vectors of these hold four pixels of L samples, which shifts separate.
// The 16 samples that share a line of the cache are packed together; meanwhile the images of the next 16 are fetched, since
// images lie anywhere in memory.
void pack_normalised_images(const uint8_t* images, const int64_t* indices, int count, int channels, ptrdiff_t pixels,
                          const float* mean, const float* scale, float* target) {
    constexpr int block = linear_vectors * L;
    constexpr int line = 16;            // samples
    constexpr ptrdiff_t piece = 4 * L;  // pixels
    static_assert(block % line == 0 && line % L == 0);
    const ptrdiff_t size = channels * pixels;
    for (int n = 0; n < count; n += block, target += size * block) {
        const int samples = at_most(block, count - n);
        const uint8_t* image[block];
        for (int s = 0; s < block; ++s) image[s] = images + indices[s < samples ? n + s : n] * size;
        for (int s = 0; s < line; ++s)
            for (ptrdiff_t i = 0; i < size; i += 64) __builtin_prefetch(image[s] + i);
        for (int part = 0; part < block / line * channels; ++part) {
            const int top = part / channels * line, c = part % channels;
            const float center = mean[c], slope = scale[c];
            const ptrdiff_t first = c * pixels, end = first + pixels;
            for (ptrdiff_t i = first; i < end; i += piece) {
                if (pixels < piece) {
                    for (ptrdiff_t k = i; k < end; ++k)
                        for (int s = top; s < top + line; ++s) target[k * block + s] = (float(image[s][k]) - center) * slope;
                    break;
                }
                const ptrdiff_t from = i + piece < end ? i : end - piece;  // the last may overlap the one before it
                for (int s = top; s < top + line; s += L) {
                    vec rows[L];
                    for (int j = 0; j < L; ++j) {
                        rows[j] = *reinterpret_cast<const anywhere*>(image[s + j] + from);
                        if (top + line < block) __builtin_prefetch(image[s + line + j] + from);
                    }
                    transpose(rows);
                    for (int j = 0; j < L; ++j) {
                        const ints four = reinterpret_cast<const ints&>(rows[j]);
                        for (int k = 0; k < 4; ++k) {
                            const ints one = four >> (8 * (little_endian ? k : 3 - k)) & 255;
                            store(target + (from + 4 * j + k) * block + s, (__builtin_convertvector(one, vec) - center) * slope);
                        }
                    }
                }
            }
        }
        for (ptrdiff_t k = 0; k < size && samples < block; ++k)
            for (int s = samples; s < block; ++s) target[k * block + s] = 0;
    }
}

constexpr int conv_block = conv_vectors * L;
static_assert(conv_vectors == 2 && conv_pixels == 4);

inline float* at(Packed p, int n, int c, int y) { return p.data + n * p.blocks + c * p.channel + y * p.row; }

inline int count_blocks(int batch) { return (batch + conv_block - 1) / conv_block; }

// The samples of a block.
inline int samples_of(int batch, int n) { return at_most(conv_block, batch - n * conv_block); }

// Calls body(block, channel, row) for each row of pixels, channel by channel.
template <class Body>
void each_row(ImageSize size, const Body& body) {
    for (int c = 0; c < size.channels; ++c)
        for (int n = 0; n < count_blocks(size.batch); ++n)
            for (int y = 0; y < size.height; ++y) body(n, c, y);
}

// Sets to zero what lies beyond the last sample.
void clear_rest(float* row, int width, int samples) {
    if (samples < conv_block)
        for (int x = 0; x < width; ++x) std::memset(row + x * conv_block + samples, 0, sizeof(float) * (conv_block - samples));
}

void pack_images(View from, ImageSize size, int border, Packed to) {
    const int rows = size.height + 2 * border, columns = size.width + 2 * border;
    for (int n = 0; n < count_blocks(size.batch); ++n) {
        View part = from;
        part.data += ptrdiff_t(n) * conv_block * from.n;
        pack(part, size.height, size.width, samples_of(size.batch, n), conv_block, size.channels, -border, rows, -border,
             columns, at(to, n, 0, -border) - border * conv_block, to.channel);
    }
}

void unpack_images(Packed from, ImageSize size, View to) {
    for (int n = 0; n < count_blocks(size.batch); ++n) {
        const int samples = samples_of(size.batch, n);
        for (int c = 0; c < size.channels; ++c)
            for (int y = 0; y < size.height; ++y) {
                const float* in = at(from, n, c, y);
                float* out = to.data + ptrdiff_t(n) * conv_block * to.n + c * to.c + y * to.h;
                for (int x = 0; x < size.width; ++x, in += conv_block, out += to.w) {
                    if (to.n == 1)
                        std::memcpy(out, in, sizeof(float) * samples);
                    else
                        for (int s = 0; s < samples; ++s) out[s * to.n] = in[s];
                }
            }
    }
}

// P pixels of a pass: where they are read, and where they lie in the target and in other images of its size; and the first
// pixel after them. S and T are the steps of the source and of the target: four pixels of a row then need one address in
// each, which leaves registers to the loops over taps. If S and T are 0, steps are any, and each pixel has its own addresses.
template <int P, int S, int T>
struct Pixels {
    static constexpr int count = P, run = S ? 4 : 1, runs = P / run;
    const float *source[runs], *next_source;
    float *target[runs], *next_target, *beside[runs], *next_beside;
    int tile, samples;
    bool last_of_row;

    const float* source_of(int p) const { return source[p / run] + p % run * S * conv_block; }
    float* target_of(int p) const { return target[p / run] + p % run * T * conv_block; }
    float* beside_of(int p) const { return beside[p / run] + p % run * T * conv_block; }
};

// Calls body(P pixels) for all pixels of a pass: for each block of samples strip by strip, in each strip band by band, in
// each band tile by tile, so that what is read at random stays in the cache.
template <int most, class Body>
void each_group(const Pass& pass, int batch, Packed from, Packed to, Packed beside, const Body& body) {
    for (int n = 0; n < count_blocks(batch); ++n)
        for (int left = 0; left < pass.grid_width; left += pass.strip)
            for (int top = 0; top < pass.grid_height; top += pass.band)
                for (int tile = 0; tile < pass.tiles; ++tile) {
                    const int width = at_most(pass.strip, pass.grid_width - left);
                    const int end = width * at_most(pass.band, pass.grid_height - top);
                    int i = 0, j = 0;
                    const auto source = [&] {
                        return at(from, n, tile * pass.tile_channels, (top + i) * pass.source_step - pass.pad_top) +
                               ((left + j) * pass.source_step - pass.pad_left) * conv_block;
                    };
                    const auto target = [&](Packed images) {
                        return at(images, n, 0, (top + i) * pass.target_step + pass.target_top) +
                               ((left + j) * pass.target_step + pass.target_left) * conv_block;
                    };
                    const auto next = [&](auto pixels) {
                        for (int p = 0; p < pixels.runs; ++p) {
                            pixels.source[p] = source();
                            pixels.target[p] = target(to);
                            pixels.beside[p] = target(beside);
                            j += pixels.run;
                            if (j == width) j = 0, ++i;
                        }
                        pixels.next_source = source();
                        pixels.next_target = target(to);
                        pixels.next_beside = target(beside);
                        pixels.last_of_row = j == 0;
                        pixels.tile = tile;
                        pixels.samples = samples_of(batch, n);
                        body(pixels);
                    };
                    int first = 0;
                    const auto steps = [&](int of_source, int of_target) {
                        return width % 4 == 0 && pass.source_step == of_source && pass.target_step == of_target;
                    };
                    if (steps(1, 1)) {
                        for (; most > 4 && first + most <= end; first += most) next(Pixels<most, 1, 1>{});
                        for (; first < end; first += 4) next(Pixels<4, 1, 1>{});
                    } else if (steps(2, 1)) {
                        for (; first < end; first += 4) next(Pixels<4, 2, 1>{});
                    } else if (steps(1, 2)) {
                        for (; first < end; first += 4) next(Pixels<4, 1, 2>{});
                    } else {
                        for (; first + 4 <= end; first += 4) next(Pixels<4, 0, 0>{});
                        for (; first < end; ++first) next(Pixels<1, 0, 0>{});
                    }
                }
}

// Many channels are read and written at once, too many places for a processor to foresee, so the next pixels are fetched in
// time, in the last rows that taps reach: the others were read for the row of pixels above. Some channels of the source go
// with each row of the target, since a processor that waits for many lines at once computes nothing meanwhile.
template <int P, int S, int T>
struct Ahead {
    const int32_t *channel, *last;  // of the source, those that are left
    int share, rows, floats;        // channels for each row of the target; of each, rows and floats of a row
    const float* source;
    ptrdiff_t source_channel, source_row, target_pixel;

    Ahead(const Pass& pass, const Pixels<P, S, T>& group, Packed from)
        : channel(pass.tapped + pass.tapped_split[group.tile]),
          last(P > 1 ? pass.tapped + pass.tapped_split[group.tile + 1] : channel),
          share((int(last - channel) + pass.rows - 1) / pass.rows),
          rows(at_most(pass.source_step, pass.tap_height)),
          source_channel(from.channel),
          source_row(from.row),
          target_pixel(ptrdiff_t(pass.target_step) * conv_block) {
        const int read = group.last_of_row ? 0 : pass.tap_width > pass.source_step ? pass.tap_width - pass.source_step : 0;
        // Rows of four pixels are fetched as if eight were neighbours.
        floats = conv_block * at_most(P + 4, P * pass.source_step + (group.last_of_row ? pass.tap_width - 1 : 0));
        source = group.next_source + (pass.tap_height - rows) * from.row + read * conv_block;
    }

    void fetch_source() {
        for (int i = 0; i < share && channel < last; ++i, ++channel) {
            const float* const from = source + *channel * source_channel;
            if (rows == 1 && floats == P * conv_block)
                for (int j = 0; j < P * conv_block; j += 16) __builtin_prefetch(from + j);
            else
                for (int row = 0; row < rows; ++row)
                    for (int j = 0; j < floats; j += 16) __builtin_prefetch(from + row * source_row + j);
        }
    }

    // Fetches pixels of the target, or of images of its size, from the first on.
    void fetch(const float* first) const {
        if constexpr (P > 1)
            for (int p = 0; p < P; ++p)
                for (int i = 0; i < conv_block; i += 16) __builtin_prefetch(first + p * target_pixel + i);
    }
};

// A function of its own, which takes its pixels by value: the loops around it and the numbers that it stores to memory
// must not take the registers of the loop over the taps.
template <int P, int S, int T>
[[gnu::noinline]] void gather_pixels(const Pass& pass, const int32_t* offset, const float* values, const float* bias,
                                     const float* lanes, const Pixels<P, S, T> pixels, Packed source, Packed target, bool add,
                                     const uint8_t* written) {
    const int32_t* split = pass.split + pixels.tile;
    const ptrdiff_t channel = target.channel;
    Ahead<P, S, T> ahead(pass, pixels, source);
    for (int r = 0; r < pass.rows; ++r, split += pass.tiles + 1) {
        const int begin = split[0], end = split[1];
        ahead.fetch_source();
        if (begin == end && (add || (written && !written[r]))) continue;
        ahead.fetch(pixels.next_target + r * channel);
        vec sum[P][conv_vectors];
        for (int p = 0; p < P; ++p)
            for (int v = 0; v < conv_vectors; ++v)
                sum[p][v] = add ? load(pixels.target_of(p) + r * channel + v * L)
                                : (bias ? bias[r] * load(lanes + v * L) : vec{});
        each_tap(values + begin, offset + begin, end - begin, [&](vec value, ptrdiff_t from) {
            for (int p = 0; p < P; ++p)
                for (int v = 0; v < conv_vectors; ++v) sum[p][v] += value * load(pixels.source_of(p) + from + v * L);
        });
        for (int p = 0; p < P; ++p)
            for (int v = 0; v < conv_vectors; ++v) store(pixels.target_of(p) + r * channel + v * L, sum[p][v]);
    }
}

void gather_packed(const Pass& pass, const int32_t* offset, const float* values, const float* bias, Packed source,
                   int batch, Packed target, bool add, const uint8_t* written) {
    float lanes[2][conv_block];  // 1 for each sample of a whole block, and of the last
    for (int s = 0; s < conv_block; ++s) lanes[0][s] = 1, lanes[1][s] = s < samples_of(batch, count_blocks(batch) - 1);
    each_group<conv_pixels>(pass, batch, source, target, target, [&](const auto& pixels) {
        gather_pixels(pass, offset, values, bias, lanes[pixels.samples < conv_block], pixels, source, target,
                      add || pixels.tile > 0, written);
    });
}

// Adds the sum of in * source, over these pixels and all samples of the block, to the gradient of each tap. If `both`, also
// computes what gather_pixels does: each tap then reads the source once for two products. A function of its own for the same
// reasons.
template <bool both, int P, int S, int T>
[[gnu::noinline]] void correlate_pixels(const Pass& pass, const int32_t* offset, const float* values,
                                        const Pixels<P, S, T> pixels, Packed source, Packed target, Packed in, bool add,
                                        const uint8_t* written, float* gradient) {
    const int32_t* split = pass.split + pixels.tile;
    const ptrdiff_t channel = target.channel, in_channel = in.channel;
    Ahead<P, S, T> ahead(pass, pixels, source);
    for (int r = 0; r < pass.rows; ++r, split += pass.tiles + 1) {
        const int begin = split[0], end = split[1];
        ahead.fetch_source();
        if (begin == end && (!both || add || (written && !written[r]))) continue;
        if (both) ahead.fetch(pixels.next_target + r * channel);
        if (begin != end) ahead.fetch(pixels.next_beside + r * in_channel);
        vec sum[P][conv_vectors], factor[P][conv_vectors];
        for (int p = 0; p < P; ++p)
            for (int v = 0; v < conv_vectors; ++v) {
                if (both) sum[p][v] = add ? load(pixels.target_of(p) + r * channel + v * L) : vec{};
                factor[p][v] = load(pixels.beside_of(p) + r * in_channel + v * L);
            }
        const auto tap = [&](vec value, ptrdiff_t from) __attribute__((always_inline)) {
            vec total[conv_vectors];
            for (int p = 0; p < P; ++p)
                for (int v = 0; v < conv_vectors; ++v) {
                    vec x = load(pixels.source_of(p) + from + v * L);
                    if (both) read_once(x);
                    if (both) sum[p][v] += value * x;
                    total[v] = p ? total[v] + factor[p][v] * x : factor[p][v] * x;
                }
            return total[0] + total[1];
        };
        const auto rest = [&](int k) __attribute__((always_inline)) {
            return k < end ? tap(both ? values[k] - vec{} : vec{}, offset[k]) : vec{};
        };
        int k = begin;
        for (; k + 4 <= end; k += 4) {
            const FourOffsets at(offset + k);
            const vec four = both ? repeat_four(values + k) : vec{};
            const vec a = tap(spread<0>(four), at.at[0]), b = tap(spread<1>(four), at.at[1]), ab = sum_halves(a, b);
            const vec c = tap(spread<2>(four), at.at[2]), d = tap(spread<3>(four), at.at[3]), cd = sum_halves(c, d);
            add_four(gradient + k, sum_quarters(ab, cd));
        }
        if (k < end) {
            const vec a = rest(k), b = rest(k + 1), c = rest(k + 2);
            const vec4 all = sum_quarters(sum_halves(a, b), sum_halves(c, vec{}));
            for (int i = 0; k + i < end; ++i) gradient[k + i] += all[i];
        }
        for (int p = 0; both && p < P; ++p)
            for (int v = 0; v < conv_vectors; ++v) store(pixels.target_of(p) + r * channel + v * L, sum[p][v]);
    }
}

void correlate_packed(const Pass& pass, const int32_t* offset, Packed source, Packed delta, int batch, float* gradient) {
    each_group<most_pixels>(pass, batch, source, delta, delta, [&](const auto& pixels) {
        correlate_pixels<false>(pass, offset, nullptr, pixels, source, delta, delta, false, nullptr, gradient);
    });
}

void gather_and_correlate_packed(const Pass& pass, const int32_t* offset, const float* values, Packed source, int batch,
                                 Packed target, bool add, const uint8_t* written, Packed in, float* gradient) {
    each_group<conv_pixels>(pass, batch, source, target, in, [&](const auto& pixels) {
        correlate_pixels<true>(pass, offset, values, pixels, source, target, in, add || pixels.tile > 0, written, gradient);
    });
}

void sum_channels(Packed x, ImageSize size, float* sums) {
    for (int c = 0; c < size.channels; ++c) {
        double total = 0, rest = 0;
        each_row({size.batch, 1, size.height, size.width}, [&](int n, int, int y) {
            const float* row = at(x, n, c, y);
            sum_pairs(0, ptrdiff_t(size.width) * conv_block, total, rest,
                      [&](ptrdiff_t i, int) { return Pair{load(row + i), vec{}}; });
        });
        sums[c] = float(total);
    }
}

// Adds up pairs of vectors: `enough` of them, and the rest of a row, in single precision, and these sums in double precision.
struct Totals {
    static constexpr int chains = 4, enough = 256;
    double a = 0, b = 0;
    Pair parts[chains] = {};
    int added = 0;

    // Adds the pairs that body(i) gives for the vectors at 0 to length, a multiple of two vectors.
    template <class Body>
    void add(ptrdiff_t length, const Body& body) {
        Pair total[chains];
        std::memcpy(total, parts, sizeof parts);
        const auto more = [&](int c, ptrdiff_t i) {
            const Pair pair = body(i);
            total[c].a += pair.a;
            total[c].b += pair.b;
        };
        ptrdiff_t i = 0;
        for (; i + chains * L <= length; i += chains * L)
            for (int c = 0; c < chains; ++c) more(c, i + c * L);
        if (i < length) more(0, i), more(1, i + L);
        std::memcpy(parts, total, sizeof parts);
        added += int(length / L);
        if (added >= enough) flush();
    }

    void flush() {
        a += sum((parts[0].a + parts[1].a) + (parts[2].a + parts[3].a));
        b += sum((parts[0].b + parts[1].b) + (parts[2].b + parts[3].b));
        for (Pair& part : parts) part = Pair{};
        added = 0;
    }
};

// Of some numbers: how many, their mean, and the sum of their squared deviations from it.
struct Moments {
    double count = 0, mean = 0, squares = 0;

    // Adds `more` numbers, of which `deviations` has the sums of d and d * d, where d is the difference from `from`.
    void add(double more, double from, const Totals& deviations) {
        const double own = deviations.a / more, step = from + own - mean, all = count + more;
        squares += deviations.b - own * deviations.a + step * step * count * more / all;
        mean += step * more / all;
        count = all;
    }

    double variance() const { return squares < 0 ? 0 : squares / count; }
};

// Deviations in a block of samples are from the mean of its first row, which differs from that of the block by at most
// sqrt(height - 1) of the block's standard deviations. The rounding error of the sum of squared deviations from the mean,
// and so that of the variance, therefore grows at most by a factor of the height.
Moments moments(Packed x, ImageSize size, int c) {
    Moments all;
    const ptrdiff_t length = ptrdiff_t(size.width) * conv_block;
    for (int n = 0; n < count_blocks(size.batch); ++n) {
        const int samples = samples_of(size.batch, n);
        const auto add_row = [&](Totals& totals, int y, float from) {
            const float* row = at(x, n, c, y);
            if (samples == conv_block)
                return totals.add(length, [&](ptrdiff_t i) {
                    if (i % 16 == 0) __builtin_prefetch(row + x.row + i);  // of the next row
                    const vec d = load(row + i) - from;
                    return Pair{d, d * d};
                });
            for (ptrdiff_t i = 0; i < length; ++i) {
                const double d = i % conv_block < samples ? row[i] - from : 0;
                totals.a += d;
                totals.b += d * d;
            }
        };
        Totals first, deviations;
        add_row(first, 0, 0);
        first.flush();
        const float from = float(first.a / (double(samples) * size.width));
        for (int y = 0; y < size.height; ++y) add_row(deviations, y, from);
        deviations.flush();
        all.add(double(samples) * size.height * size.width, from, deviations);
    }
    return all;
}

inline vec positive(vec x) { return x < vec{} ? vec{} : x; }

// What normalisation does to a number.
struct Line {
    float from, slope, shift;
};

inline vec line_at(Line line, vec x) { return (x - line.from) * line.slope + line.shift; }

// delta where y is above 0 or no number, else 0.
inline vec gated(vec delta, vec y) {
    typedef int ints __attribute__((vector_size(4 * L)));
    const ints off = y <= vec{};
    return (vec)((ints)delta & ~off);
}

inline bool is_in(const uint8_t* channels, int c) { return !channels || channels[c]; }

// Calls body(read), where read(p) are the numbers at p, or zeros that are not there.
template <class Body>
void with_numbers(bool there, const Body& body) {
    if (there)
        body([](const float* p) { return load(p); });
    else
        body([](const float*) { return vec{}; });
}

void normalise_packed(Packed x, ImageSize size, const float* weight, const float* bias, float epsilon, float* mean,
                      float* variance, float* scale, const Packed* other, bool relu, Packed y, const uint8_t* connected,
                      const uint8_t* read) {
    const ptrdiff_t length = ptrdiff_t(size.width) * conv_block;
    for (int c = 0; c < size.channels; ++c) {
        const bool there = is_in(connected, c);
        const Moments found = there ? moments(x, size, c) : Moments{1, 0, 0};
        mean[c] = float(found.mean);
        variance[c] = float(found.variance());
        scale[c] = float(1 / __builtin_sqrt(found.variance() + epsilon));
        if (!is_in(read, c)) continue;
        const Line line{mean[c], scale[c] * weight[c], bias[c]};
        with_numbers(there, [&](const auto& numbers) {
            each_row({size.batch, 1, size.height, size.width}, [&](int n, int, int i) {
                const float *from = at(x, n, c, i), *more = other ? at(*other, n, c, i) : nullptr;
                float* const to = at(y, n, c, i);
                for (ptrdiff_t k = 0; k < length; k += L) {
                    const vec normal = line_at(line, numbers(from + k)), v = more ? normal + load(more + k) : normal;
                    store(to + k, relu ? positive(v) : v);
                }
                clear_rest(to, size.width, samples_of(size.batch, n));
            });
        });
    }
}

void normalise_gradient_packed(Packed x, Packed delta, ImageSize size, const float* weight, const float* bias,
                               const float* mean, const float* scale, bool relu, const Packed* y, Packed gradient,
                               float* weight_gradient, float* bias_gradient, const uint8_t* connected,
                               const uint8_t* read) {
    const ptrdiff_t length = ptrdiff_t(size.width) * conv_block;
    const double count = double(size.batch) * size.height * size.width;
    const bool again = relu && !y;  // the gate is found from x
    const ImageSize channel{size.batch, 1, size.height, size.width};
    for (int c = 0; c < size.channels; ++c) {
        const bool there = is_in(connected, c);
        const Line line{mean[c], scale[c] * weight[c], bias[c]};
        Totals totals;
        const auto add_up = [&](const auto& numbers) {
            each_row(channel, [&](int n, int, int i) {
                const float* in = at(x, n, c, i);
                float* d = at(delta, n, c, i);
                if (relu && y) {
                    const float* out = at(*y, n, c, i);
                    totals.add(length, [&](ptrdiff_t k) {
                        const vec g = gated(load(d + k), load(out + k));
                        store(d + k, g);
                        return Pair{g, g * (numbers(in + k) - line.from)};
                    });
                } else {
                    totals.add(length, [&](ptrdiff_t k) {
                        const vec v = numbers(in + k), g = again ? gated(load(d + k), line_at(line, v)) : load(d + k);
                        return Pair{g, g * (v - line.from)};
                    });
                }
            });
        };
        if (is_in(read, c)) with_numbers(there, add_up);
        totals.flush();
        const double total = totals.a, product = totals.b;
        weight_gradient[c] = float(product * scale[c]);
        bias_gradient[c] = float(total);
        if (!there) continue;
        if (!is_in(read, c)) {
            each_row(channel, [&](int n, int, int i) { std::memset(at(gradient, n, c, i), 0, sizeof(float) * length); });
            continue;
        }
        const float shift = float(total / count), pull = float(product / count * scale[c] * scale[c]);
        each_row(channel, [&](int n, int, int i) {
            const float *in = at(x, n, c, i), *d = at(delta, n, c, i);
            float* to = at(gradient, n, c, i);
            for (ptrdiff_t k = 0; k < length; k += L) {
                const vec v = load(in + k), g = again ? gated(load(d + k), line_at(line, v)) : load(d + k);
                store(to + k, (g - shift - (v - line.from) * pull) * line.slope);
            }
            clear_rest(to, size.width, samples_of(size.batch, n));
        });
    }
}

void sum_packed(Packed a, const Packed* b, ImageSize size, bool relu, Packed y) {
    const ptrdiff_t length = ptrdiff_t(size.width) * conv_block;
    each_row(size, [&](int n, int c, int i) {
        const float *one = at(a, n, c, i), *two = b ? at(*b, n, c, i) : nullptr;
        float* to = at(y, n, c, i);
        for (ptrdiff_t k = 0; k < length; k += L) {
            const vec v = two ? load(one + k) + load(two + k) : load(one + k);
            store(to + k, relu ? gated(v, v) : v);
        }
    });
}

void gate_packed(Packed delta, Packed y, ImageSize size) {
    each_row(size, [&](int n, int c, int i) {
        float *d = at(delta, n, c, i), *out = at(y, n, c, i);
        for (ptrdiff_t k = 0; k < ptrdiff_t(size.width) * conv_block; k += L) store(d + k, gated(load(d + k), load(out + k)));
    });
}

// Calls begin(block, channel), and then body(block, channel, row and column of an output, and of its window the first row,
// the one after the last, and the same of columns) for each output.
template <class Begin, class Body>
void each_window(ImageSize size, Window w, const Begin& begin, const Body& body) {
    for (int c = 0; c < size.channels; ++c)
        for (int n = 0; n < count_blocks(size.batch); ++n) {
            begin(n, c);
            for (int i = 0; i < w.target_height; ++i)
                for (int j = 0; j < w.target_width; ++j) {
                    const int top = i * w.step_down - w.pad_top, left = j * w.step_right - w.pad_left;
                    body(n, c, i, j, top < 0 ? 0 : top, at_most(top + w.height, size.height), left < 0 ? 0 : left,
                         at_most(left + w.width, size.width));
                }
        }
}

// Fetches early what only the windows below read: processors do not foresee the jump from one row to the next.
inline void fetch_below(Packed x, int n, int c, int bottom, int left, Window w) {
    for (int row = bottom; row < bottom + w.step_down; ++row)
        for (int k = 0; k < w.step_right * conv_block; k += 16) __builtin_prefetch(at(x, n, c, row) + left * conv_block + k);
}

// All samples of a block are computed at once, since each comparison in a window waits for the one before it.
void max_pool(Packed x, ImageSize size, Window window, Packed y) {
    const auto begin = [](int, int) {};
    each_window(size, window, begin, [&](int n, int c, int i, int j, int top, int bottom, int left, int right) {
        fetch_below(x, n, c, bottom, left, window);
        vec most[conv_vectors];
        for (int v = 0; v < conv_vectors; ++v) most[v] = load(at(x, n, c, top) + left * conv_block + v * L);
        for (int row = top; row < bottom; ++row) {
            const float* const from = at(x, n, c, row);
            for (int column = left; column < right; ++column)
                for (int v = 0; v < conv_vectors; ++v) {
                    const vec other = load(from + column * conv_block + v * L);
                    most[v] = (other > most[v]) | (other != other) ? other : most[v];  // a NaN is more than all
                }
        }
        for (int v = 0; v < conv_vectors; ++v) store(at(y, n, c, i) + j * conv_block + v * L, most[v]);
    });
}

void max_pool_gradient(Packed x, Packed y, Packed delta, ImageSize size, Window window, Packed gradient) {
    const auto clear = [&](int n, int c) {
        for (int i = 0; i < size.height; ++i) std::memset(at(gradient, n, c, i), 0, sizeof(float) * size.width * conv_block);
    };
    each_window(size, window, clear, [&](int n, int c, int i, int j, int top, int bottom, int left, int right) {
        fetch_below(x, n, c, bottom, left, window);
        vec most[conv_vectors], rest[conv_vectors];  // the rest of delta goes to the first of the greatest
        for (int v = 0; v < conv_vectors; ++v) {
            most[v] = load(at(y, n, c, i) + j * conv_block + v * L);
            rest[v] = load(at(delta, n, c, i) + j * conv_block + v * L);
        }
        for (int row = top; row < bottom; ++row) {
            const float* const from = at(x, n, c, row);
            float* const to = at(gradient, n, c, row);
            for (int column = left; column < right; ++column)
                for (int v = 0; v < conv_vectors; ++v) {
                    const ptrdiff_t k = column * conv_block + v * L;
                    const vec value = load(from + k);
                    const auto found = (value == most[v]) | (value != value);
                    store(to + k, load(to + k) + (found ? rest[v] : vec{}));
                    rest[v] = found ? vec{} : rest[v];
                }
        }
    });
}

// Each row is summed on its own, which keeps rounding errors small.
void average(Packed x, ImageSize size, Packed y) {
    const float pixels = float(ptrdiff_t(size.height) * size.width);
    each_row({size.batch, size.channels, 1, 1}, [&](int n, int c, int) {
        for (int v = 0; v < conv_block; v += L) {
            vec total{};
            for (int i = 0; i < size.height; ++i) {
                vec sum{};
                for (int j = 0; j < size.width; ++j) sum += load(at(x, n, c, i) + j * conv_block + v);
                total += sum;
            }
            store(at(y, n, c, 0) + v, total / pixels);
        }
    });
}

void average_gradient(Packed delta, ImageSize size, Packed gradient) {
    const float pixels = float(ptrdiff_t(size.height) * size.width);
    each_row(size, [&](int n, int c, int i) {
        for (int v = 0; v < conv_block; v += L) {
            const vec share = load(at(delta, n, c, 0) + v) / pixels;
            for (int j = 0; j < size.width; ++j) store(at(gradient, n, c, i) + j * conv_block + v, share);
        }
    });
}

}  // namespace

}  // namespace tombola

#include "few_kernel.hpp"

namespace tombola {

extern const Kernels TOMBOLA_ISA = {TOMBOLA_NAME(TOMBOLA_ISA), linear_vectors * L, conv_vectors* L, gather, correlate,
                                   pack_features, unpack_features, rectify, gate,
                                   batch_norm, batch_norm_gradient, normalise_images, pack_normalised_images,
                                   pack_images, unpack_images, gather_packed, correlate_packed,
                                   gather_and_correlate_packed, sum_channels, normalise_packed,
                                   normalise_gradient_packed, sum_packed, gate_packed, max_pool, max_pool_gradient,
                                   average, average_gradient,
                                   L, gather_few, gather_one, pack_few};

}  // namespace tombola

// Sparse passes over batches of feature maps, compiled once per instruction set (see kernel.hpp).
//
// A weight that survives multiplies the same pixel of every sample, so the samples lie side by side
// in vectors: a few pixels of a block of samples fill eight accumulators, and each tap then costs
// one broadcast, one offset and eight multiply-adds. A linear layer is the case of one pixel.
#include "kernel.hpp"

#include <cstring>

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

typedef float vec __attribute__((vector_size(4 * L)));
typedef float unaligned __attribute__((vector_size(4 * L), aligned(4), may_alias));

inline vec load(const float* p) { return *reinterpret_cast<const unaligned*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<unaligned*>(p) = v; }

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

// Lane i of the result is the sum of the lanes of vector(first + i), for i < 2 G at G = L / 2.
template <int G, class Vector>
inline vec sums(const Vector& vector, int first) {
    if constexpr (G == 0) {
        return vector(first);
    } else {
        const vec a = sums<G / 2>(vector, first), b = sums<G / 2>(vector, first + G);
        return G == 1 ? sum_halves(a, b) : evens<G>(a, b) + odds<G>(a, b);
    }
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

// P pixels of V vectors of samples: every row of the target, or every tap of every row.
template <int P, int V>
struct Tile {
    const Pass& pass;
    int tile, samples;
    ptrdiff_t line;  // from one pixel or feature of the source to the next
    const float* source[P];

    template <class Body>
    void each_row(const Body& body) const {
        const int32_t* split = pass.split + tile;
        for (int r = 0; r < pass.rows; ++r, split += pass.tiles + 1) body(r, split[0], split[1]);
    }

    void gather(const float* values, const float* bias, float* const (&target)[P], ptrdiff_t row) const {
        const bool whole = samples == V * L;
        each_row([&](int r, int begin, int end) {
            vec sum[P][V];
            if (tile && begin == end) return;
            for (int p = 0; p < P; ++p) {
                float partial[V * L];
                const float* from = target[p] + r * row;
                if (tile && !whole) from = static_cast<float*>(std::memcpy(partial, from, sizeof(float) * samples));
                for (int v = 0; v < V; ++v) sum[p][v] = tile ? load(from + v * L) : (bias ? bias[r] : 0.f) - vec{};
            }
            for (int k = begin; k < end; ++k) {
                const float value = values[k];
                const ptrdiff_t offset = pass.offset[k] * line;
                for (int p = 0; p < P; ++p)
                    for (int v = 0; v < V; ++v) sum[p][v] += value * load(source[p] + offset + v * L);
            }
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

    void correlate(const float* const (&delta)[P], ptrdiff_t row, float* gradient) const {
        each_row([&](int r, int begin, int end) {
            vec d[P][V];
            if (begin == end) return;
            for (int p = 0; p < P; ++p)
                for (int v = 0; v < V; ++v) d[p][v] = load(delta[p] + r * row + v * L);
            const auto product = [&](int k) {
                const ptrdiff_t offset = pass.offset[k] * line;
                vec total = {};
                for (int p = 0; p < P; ++p)
                    for (int v = 0; v < V; ++v) total += d[p][v] * load(source[p] + offset + v * L);
                return total;
            };
            int k = begin;
            for (; k + L <= end; k += L) store(gradient + k, load(gradient + k) + sums<L / 2>(product, k));
            for (; k < end; ++k) gradient[k] += sum(product(k));
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

}  // namespace

}  // namespace tombola

#include "few_kernel.hpp"

namespace tombola {

extern const Kernels TOMBOLA_ISA = {TOMBOLA_NAME(TOMBOLA_ISA), linear_vectors * L, conv_vectors* L, gather, correlate,
                                   pack_features, unpack_features, rectify, gate,
                                   batch_norm, batch_norm_gradient, normalise_images, L, gather_few, gather_one, pack_few};

}  // namespace tombola

// The extension module: index structures of a mask, and dispatch to the kernels of this machine.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernel.hpp"
#include "operators.hpp"
#include "tensor.hpp"

namespace tombola {
namespace {

// Fastest first, and after these what is only tested.
std::vector<const Kernels*> supported() {
    std::vector<const Kernels*> found;
#if defined(TOMBOLA_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) found.push_back(&avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2);
#endif
    found.push_back(&plain);
#if defined(TOMBOLA_HALVES)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx512_in_halves);
#endif
    return found;
}

// The instruction set of this name, or the fastest for none.
using Name = std::optional<std::string>;
const Kernels& kernels_named(const Name& name) {
    static const std::vector<const Kernels*> all = supported();
    for (const Kernels* k : all)
        if (!name || *name == k->name) return *k;
    throw std::invalid_argument("instruction_set: expected one of this machine's, got '" + *name + "'");
}

// Calls of the functions for packed images. Each is checked when it is put here. All are computed later, one directly
// after another: if Python ran between two of them, it would push images out of the processor's caches.
class Calls {
  public:
    // Checks a call, and keeps its arguments until `run`. A function of Python is refused: it could call one of ours with
    // arguments that are freed before.
    void put(nb::object function, nb::args arguments) {
        if (Py_TYPE(function.ptr()) != types_.first && Py_TYPE(function.ptr()) != types_.second)
            throw nb::type_error("function: expected one of the extension");
        struct Putting {
            Calls* const before;
            explicit Putting(Calls* calls) : before(std::exchange(putting_, calls)) {}
            ~Putting() { putting_ = before; }
        } const putting(this);
        function(*arguments);
        kept_.push_back(std::move(function));
        kept_.push_back(std::move(arguments));
    }

    // Computes what was put here, and forgets it.
    void run() {
        const std::vector<nb::object> kept = std::exchange(kept_, {});
        const std::vector<std::function<void()>> calls = std::exchange(calls_, {});
        nb::gil_scoped_release unlocked;
        for (const auto& call : calls) call();
    }

    // What the function that calls this is put into; null if it is called directly. A function asks before it checks its
    // arguments, because Python may call others meanwhile, for example where it collects garbage.
    static Calls* putting() { return std::exchange(putting_, nullptr); }

    // Computes a call whose arguments are checked: now, or when the calls are run that it was put into.
    template <class Work>
    static void compute(Calls* calls, Work work) {
        if (calls) {
            calls->calls_.emplace_back(std::move(work));
            return;
        }
        nb::gil_scoped_release unlocked;
        work();
    }

    // Sets the types that functions, and methods of objects, have in extensions.
    static void set_types(nb::handle function, nb::handle method) {
        types_ = {Py_TYPE(function.ptr()), Py_TYPE(method.ptr())};
    }

  private:
    static inline std::pair<const PyTypeObject*, const PyTypeObject*> types_{};  // set when the module is loaded
    static inline thread_local Calls* putting_ = nullptr;
    std::vector<nb::object> kept_;
    std::vector<std::function<void()>> calls_;
};

// A batch of samples that Python holds, in any layout.
struct Batch {
    View view;
    int samples;
};

// The tensor `name` as a batch, whose shape is given with `any` for the number of samples.
Batch batch_of(const char* name, nb::handle tensor, std::initializer_list<ptrdiff_t> shape, bool check = true) {
    const auto [data, size, step] = Tensor<float>(name, tensor).strided(shape, check);
    if (size.at[0] > INT_MAX / 2)
        throw std::invalid_argument(std::string(name) + ": expected at most 2^30 samples, got " +
                                    std::to_string(size.at[0]));
    return {{data, step.at[0], step.at[1], step.at[2], step.at[3], 0, false}, static_cast<int>(size.at[0])};
}

// A batch to write to: no two elements may be one number, as in an expanded tensor. Most targets are new tensors; their
// storage is only checked if asked, to save time.
View target_of(nb::handle tensor, std::initializer_list<ptrdiff_t> shape, bool check = false) {
    const View view = batch_of("target", tensor, shape, check).view;
    const ptrdiff_t steps[] = {view.n, view.c, view.h, view.w};
    for (size_t i = 0; i < shape.size(); ++i)
        if (shape.begin()[i] > 1 && steps[i] == 0) Tensor<float>("target", tensor).refuse(", not expanded");
    return view;
}

void check_apart(const float* target, const char* name, const float* source) {
    if (target && target == source)
        throw std::invalid_argument(std::string("target: expected memory of its own, got that of ") + name);
}

// The address of a contiguous tensor, null for None.
float* contiguous_or_null(const char* name, nb::handle tensor, std::initializer_list<ptrdiff_t> shape) {
    return tensor.is_none() ? nullptr : Tensor<float>(name, tensor).contiguous(shape);
}

// Memory for so many elements, to be freed, from a multiple of `alignment` bytes on; to a sanitizer, not a byte more.
template <class T>
T* allocate(size_t count, size_t alignment) {
    void* memory = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    if (posix_memalign(&memory, alignment, count * sizeof(T))) throw std::bad_alloc();
#else
    const size_t lines = std::max<size_t>((count * sizeof(T) + alignment - 1) / alignment, 1);
    memory = std::aligned_alloc(alignment, lines * alignment);
    if (!memory) throw std::bad_alloc();
#endif
    return static_cast<T*>(memory);
}

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};

// Memory for packed tiles, kept from call to call by each thread.
float* workspace(size_t floats) {
    thread_local std::unique_ptr<float, Free> memory;
    [[maybe_unused]] thread_local size_t size = 0;
    constexpr size_t page = 4096;
#if defined(__SANITIZE_ADDRESS__)
    memory.reset(allocate<float>(floats, page));
#else
    if (floats > size) {
        const size_t more = (floats + 1023) / 1024 * 1024;
        size = 0;
        memory.reset(allocate<float>(more, page));
        size = more;
    }
#endif
    return memory.get();
}

// The size of packed images as Python gives it: batch, channels, height, width.
using Size4 = std::tuple<int, int, int, int>;

std::string size_text(const ImageSize& size) { return text({size.batch, size.channels, size.height, size.width}); }

bool operator==(const ImageSize& a, const ImageSize& b) {
    return std::tie(a.batch, a.channels, a.height, a.width) == std::tie(b.batch, b.channels, b.height, b.width);
}

// Packed images of one size and instruction set, with `border` zeros around each image, in memory of their own, which is
// zero at first: (blocks, channels, pixels, block), where the pixels are those of the image with its border, and maybe
// some more, which are never read.
class PackedImages {
  public:
    PackedImages(Size4 of, int border, const Name& instruction_set)
        : kernels_(kernels_named(instruction_set)), border_(border) {
        std::tie(size_.batch, size_.channels, size_.height, size_.width) = of;
        for (const int each : {size_.batch, size_.channels, size_.height, size_.width})
            if (each < 1 || each > 1 << 28)
                throw std::invalid_argument("size: expected numbers from 1 to 2^28, got " + std::to_string(each));
        if (border < 0 || border > 1 << 20)
            throw std::invalid_argument("border: expected from 0 to 2^20, got " + std::to_string(border));
        const ptrdiff_t block = kernels_.conv_block, columns = size_.width + 2 * ptrdiff_t(border);
        ptrdiff_t lines = (size_.height + 2 * ptrdiff_t(border)) * columns;
        if (lines % 32 == 0) lines += 4;  // channels at distances of a power of 2 would share few lines of a cache
        const ptrdiff_t blocks = (ptrdiff_t(size_.batch) + block - 1) / block;
        const double floats = double(blocks) * size_.channels * double(lines) * block;
        if (floats > 1LL << 40) throw std::bad_alloc();
        packed_ = {nullptr, size_.channels * lines * block, lines * block, columns * block};
        const size_t count = blocks * packed_.blocks;
        memory_.reset(allocate<float>(count, 64));
        std::fill_n(memory_.get(), count, 0.0f);
        packed_.data = memory_.get() + border * (columns + 1) * block;
    }

    const Packed& packed() const { return packed_; }
    const Kernels& kernels() const { return kernels_; }
    const ImageSize& size() const { return size_; }
    int border() const { return border_; }

    // Returns the images; raises an error, which calls them `name`, unless they have this size and instruction set.
    const Packed& as(const char* name, const ImageSize& size, const Kernels& kernels) const {
        if (!(size_ == size) || &kernels_ != &kernels)
            throw std::invalid_argument(std::string(name) + ": expected images of size " + size_text(size) +
                                        " packed for " + kernels.name + ", got " + size_text(size_) + " packed for " +
                                        kernels_.name);
        return packed_;
    }

    void check_apart(const char* name, const char* other, const PackedImages& source) const {
        if (this == &source)
            throw std::invalid_argument(std::string(name) + ": expected memory of its own, got that of " + other);
    }

  private:
    const Kernels& kernels_;
    ImageSize size_{};
    int border_;
    Packed packed_{};
    std::unique_ptr<float, Free> memory_;
};

// Bytes of a cache for packed activations, and taps that are worth a piece of a row, as measured.
struct Sizes {
    size_t first_cache, least_taps;
};
constexpr Sizes of_pixels{24 << 10, 12}, of_one_pixel{32 << 10, 40}, of_one_pixel_of_avx512{32 << 10, 20};
const size_t second_cache = 256 << 10;
// Of packed images: what a strip reads at once, and what a band of one writes if tiles read it again.
const size_t strip_cache = 192 << 10, band_cache = 96 << 10;
// Taps that are worth a piece of a row of packed images, whose sums are stored far apart.
const size_t least_packed_taps = 30;

struct Tap {
    int channel, y, x;
};

// A Pass and the arrays it points to.
struct Structure {
    Pass pass{}, images{};  // of any layout, and of packed images
    std::vector<int32_t> split, offset, first_offset, images_split, tapped, tapped_split;
    std::vector<int32_t> tile_channel;  // for each tap, the number of its channel within the tile, for packed images
    std::vector<Tap> taps;
    size_t source_floats = 0, target_floats = 0;

    // The zeros that the pass reads around its source.
    int border() const {
        const Pass& p = pass;
        return std::max({0, p.pad_top, p.pad_left,
                         (p.grid_height - 1) * p.source_step + p.tap_height - p.pad_top - p.height,
                         (p.grid_width - 1) * p.source_step + p.tap_width - p.pad_left - p.width});
    }

    // Of each tap from the pixel of the pass, in floats of a packed source.
    void offsets(const Packed& source, int32_t* to) const {
        for (size_t k = 0; k < taps.size(); ++k)
            to[k] = static_cast<int32_t>(tile_channel[k] * source.channel + taps[k].y * source.row +
                                         ptrdiff_t(taps[k].x) * pass.block);
    }

    // taps[first[r]] to taps[first[r + 1]] are those of row r, by ascending channel; left out where `wanted` says so.
    template <class Wanted>
    void build(std::vector<Tap> all, const std::vector<int32_t>& first, const Wanted& wanted) {
        taps = std::move(all);
        Pass& p = pass;
        const int columns = (p.grid_width - 1) * p.source_step + p.tap_width;
        const size_t line = sizeof(float) * columns * p.block;
        const auto height = [&](int band) { return (band - 1) * p.source_step + p.tap_height; };
        // The lines that one group of pixels reads should fit the first cache, but a piece of a row costs a load and
        // a store of the accumulators, so it should have some taps; the packed tile should fit the second cache.
        const size_t window = sizeof(float) * p.block * p.tap_height * (p.tap_width + (p.grid_width > 1 ? 3 : 0));
        const bool one_pixel = p.grid_height == 1 && p.grid_width == 1;
        const bool avx512 = p.block == 16 * linear_vectors;
        const Sizes sizes = !one_pixel ? of_pixels : avx512 ? of_one_pixel_of_avx512 : of_one_pixel;
        const size_t fitting = sizes.first_cache / window;
        const size_t worth = sizes.least_taps * p.rows * p.channels / (taps.size() + 1);
        size_t channels = std::max({fitting, worth, size_t(1)});
        const size_t channels_worth_a_tile = channels;
        p.band = p.grid_height;
        while (p.band > 2 && std::min<size_t>(channels, p.channels) * line * height(p.band) > second_cache)
            p.band = (p.band + 1) / 2;
        channels = std::min(channels, std::max<size_t>(1, second_cache / (line * height(p.band))));
        p.tiles = static_cast<int>((p.channels + channels - 1) / channels);
        p.tile_channels = (p.channels + p.tiles - 1) / p.tiles;
        p.tiles = (p.channels + p.tile_channels - 1) / p.tile_channels;

        source_floats = line / sizeof(float) * height(p.band) * p.tile_channels;
        if (source_floats > INT32_MAX) throw std::invalid_argument("image: the tiles of so large an image are too large");
        target_floats = size_t(p.rows) * p.band * p.grid_width * p.block;
        split.reserve(size_t(p.rows) * (p.tiles + 1));
        for (int r = 0; r < p.rows; ++r) {
            int32_t k = wanted(r) ? first[r] : first[r + 1];
            for (int tile = 0; tile < p.tiles; ++tile) {
                split.push_back(k);
                while (k < first[r + 1] && taps[k].channel < (tile + 1) * p.tile_channels) ++k;
            }
            split.push_back(k);
        }
        offset.reserve(taps.size());
        for (int tile = 0; tile < p.tiles; ++tile) {
            first_offset.push_back(static_cast<int32_t>(offset.size()));
            for (int r = 0; r < p.rows; ++r) {
                const int32_t* const piece = split.data() + ptrdiff_t(r) * (p.tiles + 1) + tile;
                for (int32_t k = piece[0]; k < piece[1]; ++k)
                    offset.push_back(((taps[k].channel - tile * p.tile_channels) * height(p.band) + taps[k].y) * columns +
                                     taps[k].x);
            }
        }
        p.split = split.data();
        p.offset = offset.data(), p.first_offset = first_offset.data();
        build_images(first, channels_worth_a_tile, wanted);
    }

  private:
    // The same for packed images, which are read where they are.
    template <class Wanted>
    void build_images(const std::vector<int32_t>& first, size_t worth, const Wanted& wanted) {
        Pass& p = images;
        p = pass;
        const auto lines = [&](int strip) {  // of a channel that a strip reads for one row, and the next of them
            return size_t(p.tap_height + p.source_step) * ((strip - 1) * p.source_step + p.tap_width);
        };
        const size_t line = sizeof(float) * p.block;
        p.strip = (p.grid_width + 3) / 4 * 4;
        while (p.strip > 4 && std::min<size_t>(worth, p.channels) * lines(p.strip) * line > strip_cache)
            p.strip = (p.strip / 2 + 3) / 4 * 4;
        const size_t worth_a_piece = std::max(worth, least_packed_taps * p.rows * p.channels / (taps.size() + 1));
        const size_t most = std::max<size_t>(1, 2 * strip_cache / (lines(p.strip) * line));
        const size_t channels = std::min(worth_a_piece, most);
        p.tiles = static_cast<int>((p.channels + channels - 1) / channels);
        p.tile_channels = (p.channels + p.tiles - 1) / p.tiles;
        p.tiles = (p.channels + p.tile_channels - 1) / p.tile_channels;
        // Sums over pixels go band by band, so that the bands must not depend on the pieces of rows.
        const bool bands = size_t(p.channels) > std::min(worth, most);
        p.band = p.grid_height;
        while (bands && p.band > 2 && size_t(p.band) * p.strip * p.rows * line > band_cache) p.band = (p.band + 1) / 2;
        images_split.reserve(size_t(p.rows) * (p.tiles + 1));
        for (int r = 0; r < p.rows; ++r) {
            int32_t k = wanted(r) ? first[r] : first[r + 1];
            for (int tile = 0; tile < p.tiles; ++tile) {
                images_split.push_back(k);
                while (k < first[r + 1] && taps[k].channel < (tile + 1) * p.tile_channels) ++k;
            }
            images_split.push_back(k);
        }
        p.split = images_split.data();
        p.offset = p.first_offset = nullptr;
        std::vector<bool> is_tapped(p.channels);
        for (int r = 0; r < p.rows; ++r)
            for (int32_t k = first[r]; k < first[r + 1] && wanted(r); ++k) is_tapped[taps[k].channel] = true;
        for (int c = 0; c < p.channels; ++c) {
            if (c % p.tile_channels == 0) tapped_split.push_back(static_cast<int32_t>(tapped.size()));
            if (is_tapped[c]) tapped.push_back(c % p.tile_channels);
        }
        tapped_split.push_back(static_cast<int32_t>(tapped.size()));
        tile_channel.reserve(taps.size());
        for (const Tap& tap : taps) tile_channel.push_back(tap.channel % p.tile_channels);
        p.tapped = tapped.data(), p.tapped_split = tapped_split.data();
    }
};

// What the three products of one layer need to know of its mask, for images of one size. A linear
// layer is a convolution of an image of one pixel. Values and their gradient are in the order of
// `alive`: the ascending flat indices of the survivors in a weight of shape (outputs, inputs, kernel). What leads to
// outputs that are not `read` is left out of the work: they are their bias, and the gradients of their weights 0.
class Layer {
  public:
    Layer(nb::handle alive_tensor, int outputs, int inputs, std::pair<int, int> kernel, std::pair<int, int> image,
          int stride, std::pair<int, int> padding, const Name& instruction_set, nb::handle read_tensor)
        : kernels_(kernels_named(instruction_set)) {
        const auto [kernel_height, kernel_width] = kernel;
        const auto [height, width] = image;
        check(outputs, inputs, kernel, image, stride, padding);
        const bool* const read = Tensor<const bool>("read", read_tensor).contiguous({outputs});
        const auto [indices, sizes, step] = Tensor<const int64_t>("alive", alive_tensor).strided({any});
        Tensor<const int64_t>("alive", alive_tensor).contiguous({any});
        const int kernel_size = kernel_height * kernel_width;
        const int count = check_indices(indices, sizes.at[0], outputs, int64_t(inputs) * kernel_size);
        count_ = count;
        const bool linear = kernel_size == 1 && height == 1 && width == 1 && padding == std::pair(0, 0);
        const int block = linear ? kernels_.linear_block : kernels_.conv_block;

        struct Weight {
            int output, input, y, x;
        };
        std::vector<Weight> weights;
        weights.reserve(count);
        for (int k = 0; k < count; ++k) {
            const int64_t flat = indices[k];
            const int64_t channel = flat / kernel_size;  // of all outputs' inputs, which may be more than an int holds
            const int tap = static_cast<int>(flat % kernel_size);
            weights.push_back({static_cast<int>(channel / inputs), static_cast<int>(channel % inputs),
                               tap / kernel_width, tap % kernel_width});
        }

        std::vector<Tap> taps;
        std::vector<int32_t> first(outputs + 1);
        for (const Weight& w : weights) {
            taps.push_back({w.input, w.y, w.x});
            ++first[w.output + 1];
        }
        for (int r = 0; r < outputs; ++r) first[r + 1] += first[r];
        Pass& f = forward_.pass;
        f.rows = outputs, f.channels = inputs, f.height = height, f.width = width;
        f.pad_top = padding.first, f.pad_left = padding.second;
        f.tap_height = kernel_height, f.tap_width = kernel_width;
        f.grid_height = f.target_height = (height + 2 * padding.first - kernel_height) / stride + 1;
        f.grid_width = f.target_width = (width + 2 * padding.second - kernel_width) / stride + 1;
        f.source_step = stride, f.target_step = 1, f.block = block;
        forward_.build(std::move(taps), first, [&](int r) { return read[r]; });
        connected_outputs_.resize(outputs);
        connected_inputs_.resize(inputs);
        for (const Weight& w : weights)
            if (read[w.output]) connected_outputs_[w.output] = connected_inputs_[w.input] = 1;

        // Input pixel (stride * i + a, stride * j + b) is reached by the taps of one phase of the kernel only,
        // and each of these from the output pixel (i, j) plus a constant shift.
        order_.reserve(count);
        for (int a = 0; a < std::min(stride, height); ++a)
            for (int b = 0; b < std::min(stride, width); ++b) {
                Structure& structure = backward_.emplace_back();
                Pass& p = structure.pass;
                p.rows = inputs, p.channels = outputs, p.height = f.grid_height, p.width = f.grid_width;
                p.grid_height = (height - a + stride - 1) / stride, p.grid_width = (width - b + stride - 1) / stride;
                p.source_step = 1, p.target_step = stride, p.target_top = a, p.target_left = b;
                p.target_height = height, p.target_width = width, p.block = block;
                std::tie(p.pad_top, p.tap_height) = shifts(a + padding.first, kernel_height, stride);
                std::tie(p.pad_left, p.tap_width) = shifts(b + padding.second, kernel_width, stride);

                std::vector<int32_t> start(inputs + 1);
                const auto in_phase = [&](const Weight& w) {
                    return read[w.output] && (a + padding.first - w.y) % stride == 0 &&
                           (b + padding.second - w.x) % stride == 0;
                };
                for (const Weight& w : weights)
                    if (in_phase(w)) ++start[w.input + 1];
                for (int r = 0; r < inputs; ++r) start[r + 1] += start[r];
                const size_t done = order_.size();
                std::vector<Tap> transposed(start.back());
                order_.resize(done + start.back());
                std::vector<int32_t> next(start);
                for (int k = 0; k < count; ++k) {
                    const Weight& w = weights[k];
                    if (!in_phase(w)) continue;
                    const int at = next[w.input]++;
                    order_[done + at] = k;
                    transposed[at] = {w.output, (a + padding.first - w.y) / stride + p.pad_top,
                                      (b + padding.second - w.x) / stride + p.pad_left};
                }
                structure.build(std::move(transposed), start, [](int) { return true; });
            }
    }

    int block() const { return forward_.pass.block; }
    int outputs() const { return forward_.pass.rows; }
    int inputs() const { return forward_.pass.channels; }
    const std::vector<uint8_t>& connected_outputs() const { return connected_outputs_; }
    const std::vector<uint8_t>& connected_inputs() const { return connected_inputs_; }
    const Kernels& kernels() const { return kernels_; }

    void forward(nb::handle values, nb::handle bias, nb::handle source, nb::handle target) const {
        const float *w = values_of(values), *b = bias_of(bias);
        const auto [x, samples] = source_of(source);
        const Target y = target_of("target", target, forward_.pass, samples);
        check_apart(y.data, "source", x.data);
        nb::gil_scoped_release unlocked;
        kernels_.gather(forward_.pass, w, b, x, samples, y, workspace(forward_.source_floats));
    }

    void input_gradient(nb::handle values, nb::handle delta, nb::handle target) const {
        const float* w = values_of(values);
        const auto [d, samples] = delta_of(delta);
        const Target dx = target_of("target", target, backward_[0].pass, samples);
        check_apart(dx.data, "delta", d.data);
        nb::gil_scoped_release unlocked;
        input_gradient(w, d, samples, dx, workspace(count_in_lines() + backward_floats()));
    }

    void weight_gradient(nb::handle source, nb::handle delta, nb::handle gradient, nb::handle bias_gradient) const {
        const auto [x, samples] = source_of(source);
        const auto [d, deltas] = delta_of(delta);
        if (deltas != samples)
            throw std::invalid_argument("delta: expected " + std::to_string(samples) + " samples like source, got " +
                                        std::to_string(deltas));
        float *dw = Tensor<float>("gradient", gradient).contiguous({count_}),
              *db = contiguous_or_null("bias_gradient", bias_gradient, {outputs()});
        nb::gil_scoped_release unlocked;
        kernels_.correlate(forward_.pass, x, d, samples, dw, db,
                           workspace(forward_.source_floats + forward_.target_floats));
    }

    // The zeros that its products read around packed sources, and around packed gradients of its outputs.
    int border() const { return forward_.border(); }
    int delta_border() const {
        int most = 0;
        for (const Structure& structure : backward_) most = std::max(most, structure.border());
        return most;
    }

    // The products of packed images. `all` also writes outputs, and gradients of inputs, that have no connection.
    void forward_images(nb::handle values, nb::handle bias, const PackedImages& source, const PackedImages& target,
                        bool all) const {
        Calls* const calls = Calls::putting();
        const float *w = values_of(values), *b = bias_of(bias);
        const int batch = source.size().batch;
        const Packed x = inputs_of("source", source, batch, border()), y = outputs_of("target", target, batch, 0);
        target.check_apart("target", "source", source);
        Calls::compute(calls, [=] {
            int32_t* const offset = reinterpret_cast<int32_t*>(workspace(count_in_lines(forward_.taps.size())));
            forward_.offsets(x, offset);
            kernels_.gather_packed(forward_.images, offset, w, b, x, batch, y, false,
                                   all ? nullptr : connected_outputs_.data());
        });
    }

    void input_gradient_images(nb::handle values, const PackedImages& delta, const PackedImages& target, bool add,
                               bool all) const {
        Calls* const calls = Calls::putting();
        const float* w = values_of(values);
        const int batch = delta.size().batch;
        const Packed d = outputs_of("delta", delta, batch, delta_border()), dx = inputs_of("target", target, batch, 0);
        target.check_apart("target", "delta", delta);
        Calls::compute(calls, [=] {
            float* const memory = workspace(2 * count_in_lines(order_.size()));
            backward_images(w, d, add, memory, [&](const Pass& pass, const int32_t* offset, const float* ordered, size_t) {
                kernels_.gather_packed(pass, offset, ordered, nullptr, d, batch, dx, add,
                                       all ? nullptr : connected_inputs_.data());
            });
        });
    }

    void weight_gradient_images(const PackedImages& source, const PackedImages& delta, nb::handle gradient,
                                nb::handle bias_gradient) const {
        Calls* const calls = Calls::putting();
        const int batch = source.size().batch;
        const Packed x = inputs_of("source", source, batch, border()), d = outputs_of("delta", delta, batch, 0);
        float *dw = Tensor<float>("gradient", gradient).contiguous({count_}),
              *db = contiguous_or_null("bias_gradient", bias_gradient, {outputs()});
        Calls::compute(calls, [=, size = delta.size()] {
            int32_t* const offset = reinterpret_cast<int32_t*>(workspace(count_in_lines(forward_.taps.size())));
            forward_.offsets(x, offset);
            std::fill_n(dw, count_, 0.0f);
            kernels_.correlate_packed(forward_.images, offset, x, d, batch, dw);
            if (db) kernels_.sum_channels(d, size, db);
        });
    }

    // input_gradient_images and weight_gradient_images at once, in less time: each connection reads delta once for both.
    void gradients_images(nb::handle values, const PackedImages& source, const PackedImages& delta, nb::handle gradient,
                          nb::handle bias_gradient, const PackedImages& target, bool add, bool all) const {
        Calls* const calls = Calls::putting();
        const float* w = values_of(values);
        const int batch = delta.size().batch;
        const Packed x = inputs_of("source", source, batch, 0), d = outputs_of("delta", delta, batch, delta_border()),
                     dx = inputs_of("target", target, batch, 0);
        target.check_apart("target", "delta", delta);
        target.check_apart("target", "source", source);
        float *dw = Tensor<float>("gradient", gradient).contiguous({count_}),
              *db = contiguous_or_null("bias_gradient", bias_gradient, {outputs()});
        Calls::compute(calls, [=, size = delta.size()] {
            const size_t floats = count_in_lines(order_.size());
            float *const memory = workspace(3 * floats), *const found = memory + 2 * floats;
            std::fill_n(found, order_.size(), 0.0f);
            backward_images(w, d, add, memory, [&](const Pass& pass, const int32_t* offset, const float* ordered, size_t first) {
                kernels_.gather_and_correlate_packed(pass, offset, ordered, d, batch, dx, add,
                                                     all ? nullptr : connected_inputs_.data(), x, found + first);
            });
            std::fill_n(dw, count_, 0.0f);
            for (size_t k = 0; k < order_.size(); ++k) dw[order_[k]] = found[k];
            if (db) kernels_.sum_channels(d, size, db);
        });
    }

    const float* values_of(nb::handle tensor) const { return Tensor<float>("values", tensor).contiguous({count_}); }
    const float* bias_of(nb::handle tensor) const { return contiguous_or_null("bias", tensor, {outputs()}); }

    // The same for a linear layer whose source and target are packed: (blocks, features, block). `memory` holds the
    // values in the order of the transposed weight.
    void forward_packed(const float* values, const float* bias, float* source, int batch, float* target) const {
        kernels_.gather(forward_.pass, values, bias, packed(source, inputs()), batch, packed_target(target, outputs()),
                        nullptr);
    }

    void input_gradient_packed(const float* values, float* delta, int batch, float* target, float* memory) const {
        input_gradient(values, packed(delta, outputs()), batch, packed_target(target, inputs()), memory);
    }

    void weight_gradient_packed(float* source, float* delta, int batch, float* gradient, float* bias_gradient) const {
        kernels_.correlate(forward_.pass, packed(source, inputs()), packed(delta, outputs()), batch, gradient,
                           bias_gradient, nullptr);
    }

    int count() const { return count_; }        // of the values
    size_t ordered() const { return order_.size(); }  // of those that lead to outputs that are read

    static constexpr int most_pixels = 1 << 20, most_taps = 1 << 15;  // of a side: sums and products fit an int
    static constexpr int most_features = 1 << 30;                     // sums of two fit an int

    struct Size {
        const char* name;
        int size, least, most;
    };

    static void check(int outputs, int inputs, std::pair<int, int> kernel, std::pair<int, int> image, int stride,
                      std::pair<int, int> padding) {
        check_sizes({{"outputs", outputs, 1, most_features},
                     {"inputs", inputs, 1, most_features},
                     {"kernel", kernel.first, 1, most_taps},
                     {"kernel", kernel.second, 1, most_taps},
                     {"padding", padding.first, 0, most_pixels},
                     {"padding", padding.second, 0, most_pixels},
                     {"stride", stride, 1, most_pixels},
                     {"image", image.first, std::max(1, kernel.first - 2 * padding.first), most_pixels},
                     {"image", image.second, std::max(1, kernel.second - 2 * padding.second), most_pixels}});
    }

    static void check_sizes(std::initializer_list<Size> sizes) {
        for (const auto& [name, size, least, most] : sizes)
            if (size < least || size > most)
                throw std::invalid_argument(std::string(name) + ": expected from " + std::to_string(least) + " to " +
                                            std::to_string(most) + ", got " + std::to_string(size));
    }

    // The number of indices, each of which must be above the one before it and one of the weight's.
    static int check_indices(const int64_t* indices, ptrdiff_t count, int outputs, int64_t row) {
        if (count > INT_MAX - 1 || row > INT_MAX)
            throw std::invalid_argument("alive: expected at most 2^31 - 2 indices, and as many weights an output");
        const int64_t end = outputs * row;
        for (ptrdiff_t k = 0; k < count; ++k)
            if (indices[k] < (k ? indices[k - 1] + 1 : 0) || indices[k] >= end)
                throw std::invalid_argument("alive: expected ascending indices from 0 to " + std::to_string(end - 1) +
                                            ", got " + std::to_string(indices[k]) + " at position " +
                                            std::to_string(k));
        return static_cast<int>(count);
    }

  private:
    // Calls product(pass, offsets, values, number of its first tap) for each pass from gradients of packed outputs to those
    // of inputs; with `add`, for those that have taps. `memory` holds values and offsets in the order of the passes.
    template <class Product>
    void backward_images(const float* values, const Packed& delta, bool add, float* memory, const Product& product) const {
        int32_t* const offset = reinterpret_cast<int32_t*>(memory + count_in_lines(order_.size()));
        for (size_t k = 0; k < order_.size(); ++k) memory[k] = values[order_[k]];
        size_t first = 0;
        for (const Structure& structure : backward_) {
            if (add && structure.taps.empty()) continue;
            structure.offsets(delta, offset + first);
            product(structure.images, offset + first, memory + first, first);
            first += structure.taps.size();
        }
    }

    // Checks packed images that a product reads or writes, with a border of at least `least` zeros.
    const Packed& inputs_of(const char* name, const PackedImages& images, int batch, int least) const {
        const Pass& p = forward_.pass;
        return fitting(name, images, {batch, p.channels, p.height, p.width}, least);
    }

    const Packed& outputs_of(const char* name, const PackedImages& images, int batch, int least) const {
        const Pass& p = forward_.pass;
        return fitting(name, images, {batch, p.rows, p.grid_height, p.grid_width}, least);
    }

    const Packed& fitting(const char* name, const PackedImages& images, const ImageSize& size, int least) const {
        if (block() != kernels_.conv_block) throw std::invalid_argument("expected a convolution of images");
        const Packed& packed = images.as(name, size, kernels_);
        if (images.border() < least)
            throw std::invalid_argument(std::string(name) + ": expected a border of at least " + std::to_string(least) +
                                        ", got " + std::to_string(images.border()));
        if (packed.channel * std::min(size.channels, most_tile()) > INT32_MAX)
            throw std::invalid_argument(std::string(name) + ": the images are too large");
        return packed;
    }

    // The most channels of which a tap's offset counts.
    int most_tile() const {
        int most = forward_.images.tile_channels;
        for (const Structure& structure : backward_) most = std::max(most, structure.images.tile_channels);
        return most;
    }

    Batch source_of(nb::handle tensor) const { return batch("source", tensor, forward_.pass); }

    // The gradient of a target is what a pass backward reads.
    Batch delta_of(nb::handle tensor) const { return batch("delta", tensor, backward_[0].pass); }

    Batch batch(const char* name, nb::handle tensor, const Pass& pass) const {
        Batch found = batch_of(name, tensor, {any, pass.channels, pass.height, pass.width});
        found.view.blocks = found.view.n * block();
        return found;
    }

    // (rows, height, width, batch) in memory.
    static Target target_of(const char* name, nb::handle tensor, const Pass& pass, int samples) {
        const ptrdiff_t height = pass.target_height, width = pass.target_width;
        float* data = Tensor<float>(name, tensor).batch_fastest({samples, pass.rows, height, width});
        return {data, height * width * samples, samples, pass.block};
    }

    // Over the taps y of one phase, with shift (at - y) / stride: minus the least shift, and the extent of the shifts.
    static std::pair<int, int> shifts(int at, int size, int stride) {
        int least = 0, most = 0;
        bool any = false;
        for (int y = 0; y < size; ++y)
            if ((at - y) % stride == 0) {
                const int shift = (at - y) / stride;
                least = any ? std::min(least, shift) : shift;
                most = any ? std::max(most, shift) : shift;
                any = true;
            }
        return {-least, most - least + 1};
    }

    void input_gradient(const float* values, View delta, int batch, Target target, float* memory) const {
        for (size_t k = 0; k < order_.size(); ++k) memory[k] = values[order_[k]];
        const float* ordered = memory;
        float* packed = memory + count_in_lines();
        for (const Structure& structure : backward_) {
            kernels_.gather(structure.pass, ordered, nullptr, delta, batch, target, packed);
            ordered += structure.taps.size();
        }
    }

    static size_t count_in_lines(size_t count) { return (count + 15) / 16 * 16; }
    size_t count_in_lines() const { return count_in_lines(order_.size()); }

    size_t backward_floats() const {
        size_t most = 0;
        for (const Structure& structure : backward_) most = std::max(most, structure.source_floats);
        return most;
    }

    View packed(float* data, int features) const {
        return {data, 1, block(), 0, 0, ptrdiff_t(features) * block(), true};
    }

    Target packed_target(float* data, int features) const { return {data, block(), 0, ptrdiff_t(features) * block()}; }

    const Kernels& kernels_;
    int count_ = 0;
    std::vector<uint8_t> connected_outputs_, connected_inputs_;
    Structure forward_;
    std::deque<Structure> backward_;   // by phase
    std::vector<int32_t> order_;       // of the values in the passes of backward_
};

}  // namespace
}  // namespace tombola

#include "few.hpp"

namespace tombola {
namespace {

// Linear layers, each the source of the next, some with a ReLU. What they compute stays packed from layer to layer:
// `memory` of a forward pass holds source and outputs, one after the other, for the backward pass.
class Chain {
  public:
    struct Weights {
        const float *values, *bias;
    };
    struct Gradients {
        bool wanted;
        float *values, *bias;
    };

    Chain(nb::tuple layers, std::vector<bool> relus) : owner_(layers), relus_(relus) {
        if (layers.size() == 0 || layers.size() != relus.size())
            throw std::invalid_argument("expected a ReLU or none a layer");
        for (const nb::handle object : layers) {
            if (!nb::isinstance<Layer>(object)) throw nb::type_error("layers: expected a tuple of layers");
            const Layer* const layer = nb::cast<const Layer*>(object);
            if (layer->block() != layer->kernels().linear_block ||
                (!layers_.empty() && (&layer->kernels() != &layers_.back()->kernels() ||
                                      layer->inputs() != layers_.back()->outputs())))
                throw std::invalid_argument("expected linear layers that fit together, of one instruction set");
            layers_.push_back(layer);
        }
    }

    int inputs() const { return layers_[0]->inputs(); }
    int outputs() const { return layers_.back()->outputs(); }
    const Kernels& kernels() const { return layers_[0]->kernels(); }

    // Of the memory that a batch takes.
    size_t floats(int batch) const {
        if (batch < 0) throw std::invalid_argument("batch: expected 0 or more, got " + std::to_string(batch));
        size_t features = layers_[0]->inputs();
        for (const Layer* layer : layers_) features += layer->outputs();
        return features * blocks(batch) * block();
    }

    // `weights` are the values and the bias (or None) of each layer in turn.
    void forward(const nb::tuple& weights, nb::handle source, nb::handle target, nb::handle memory) const {
        const std::vector<Weights> parameters = weights_of(weights);
        const auto [from, batch] = batch_of("source", source, {any, inputs()});
        const View to = target_of(target, {batch, outputs()});
        float* const kept = memory_of(memory, batch);
        check_apart(to.data, "source", from.data);
        check_apart(to.data, "memory", kept);
        nb::gil_scoped_release unlocked;
        pack(from, batch, kept);
        compute(parameters, batch, kept, to);
    }

    // The two passes without Python. The first reads what is packed at the begin of the memory `x`.
    void pack(View from, int batch, float* x) const { kernels().pack_features(from, inputs(), batch, x); }

    void compute(const std::vector<Weights>& parameters, int batch, float* x, View to) const {
        const size_t width = blocks(batch) * block();
        const int rounded = whole(batch);
        for (size_t i = 0; i < layers_.size(); ++i) {
            const int outputs = layers_[i]->outputs();
            float* y = x + layers_[i]->inputs() * width;
            layers_[i]->forward_packed(parameters[i].values, parameters[i].bias, x, rounded, y);
            if (relus_[i]) kernels().rectify(y, outputs * width);
            for (int f = 0; f < outputs; ++f)  // a bias makes something of no sample too
                for (int n = batch; n < rounded; ++n)
                    y[((blocks(batch) - 1) * outputs + f) * block() + n % block()] = 0;
            x = y;
        }
        kernels().unpack_features(x, layers_.back()->outputs(), batch, to);
    }

    // `gradients` are tensors like `weights`, None for both of a layer that are not wanted; so is the source's `target`.
    void backward(const nb::tuple& weights, nb::handle delta, nb::handle memory, const nb::tuple& gradients,
                  nb::handle target) const {
        const std::vector<Weights> parameters = weights_of(weights);
        const auto [from, batch] = batch_of("delta", delta, {any, outputs()});
        const View to = target.is_none() ? View{} : target_of(target, {batch, inputs()});
        float* const kept = memory_of(memory, batch);
        check_apart(to.data, "delta", from.data);
        check_apart(to.data, "memory", kept);
        const std::vector<Gradients> found = gradients_of(gradients);
        nb::gil_scoped_release unlocked;
        differentiate(parameters, from, batch, kept, found, to);
    }

    void differentiate(const std::vector<Weights>& parameters, View from, int batch, float* kept,
                       const std::vector<Gradients>& found, View to) const {
        const size_t width = blocks(batch) * block();
        const int rounded = whole(batch);
        float *dy = workspace(scratch_floats(batch)), *dx = dy + delta_floats(batch), *ordered = dx + delta_floats(batch);
        float* y = kept + floats(batch) - layers_.back()->outputs() * width;
        kernels().pack_features(from, layers_.back()->outputs(), batch, dy);
        for (size_t i = layers_.size(); i-- > 0;) {
            const Layer& layer = *layers_[i];
            float* x = y - layer.inputs() * width;
            if (relus_[i]) kernels().gate(dy, y, layer.outputs() * width);
            if (found[i].wanted)
                layer.weight_gradient_packed(x, dy, rounded, found[i].values, found[i].bias);
            if (i > 0 || to.data) layer.input_gradient_packed(parameters[i].values, dy, rounded, dx, ordered);
            std::swap(dy, dx);
            y = x;
        }
        if (to.data) kernels().unpack_features(dy, layers_[0]->inputs(), batch, to);
    }

    std::vector<Weights> weights_of(const nb::tuple& tensors) const {
        check_count("weights", tensors);
        std::vector<Weights> all;
        for (size_t i = 0; i < layers_.size(); ++i)
            all.push_back({layers_[i]->values_of(tensors[2 * i]), layers_[i]->bias_of(tensors[2 * i + 1])});
        return all;
    }

    std::vector<Gradients> gradients_of(const nb::tuple& tensors) const {
        check_count("gradients", tensors);
        std::vector<Gradients> all;
        for (size_t i = 0; i < layers_.size(); ++i) {
            const nb::handle values = tensors[2 * i], bias = tensors[2 * i + 1];
            if (values.is_none() && !bias.is_none())
                throw std::invalid_argument("gradients: expected that of a layer's values with that of its bias");
            all.push_back({!values.is_none(), contiguous_or_null("gradient", values, {layers_[i]->count()}),
                           contiguous_or_null("bias_gradient", bias, {layers_[i]->outputs()})});
        }
        return all;
    }

  private:
    void check_count(const char* name, const nb::tuple& tensors) const {
        if (tensors.size() != 2 * layers_.size())
            throw std::invalid_argument(std::string(name) + ": expected values and bias of " +
                                        std::to_string(layers_.size()) + " layers, got " +
                                        std::to_string(tensors.size()) + " tensors");
    }

    float* memory_of(nb::handle tensor, int batch) const {
        return Tensor<float>("memory", tensor).contiguous({static_cast<ptrdiff_t>(floats(batch))});
    }

    // Two gradients of activations, and a layer's values in another order.
    size_t scratch_floats(int batch) const {
        size_t values = 0;
        for (const Layer* layer : layers_) values = std::max(values, layer->ordered());
        return 2 * delta_floats(batch) + values;
    }

    size_t block() const { return layers_[0]->block(); }
    size_t blocks(int batch) const { return (batch + block() - 1) / block(); }

    // Of the gradient of the widest activations.
    size_t delta_floats(int batch) const {
        size_t features = inputs();
        for (const Layer* layer : layers_) features = std::max<size_t>(features, layer->outputs());
        return features * blocks(batch) * block();
    }

    // The batch with as many samples in its last block as the kernels compute at once.
    int whole(int batch) const {
        const int size = static_cast<int>(block()), rest = batch % size;
        int samples = size;
        while (rest && samples / 2 >= rest && samples / 2 >= size / linear_vectors) samples /= 2;
        return rest ? batch - rest + samples : batch;
    }

    nb::tuple owner_;  // of the layers: no one can empty a tuple
    std::vector<const Layer*> layers_;
    std::vector<bool> relus_;
};

// The gradient of the input of a ReLU, given the gradient of its output, and the output y. Unlike that of
// aten::threshold_backward, all of it is computed by the thread that calls: each thread has its own say in whether a
// number is so small that it counts as 0.
void gate(const View& delta, const View& y, ptrdiff_t features, ptrdiff_t batch, const View& to) {
    for (ptrdiff_t f = 0; f < features; ++f) {
        const float *const d = delta.data + f * delta.c, *const out = y.data + f * y.c;
        float* const __restrict target = to.data + f * to.c;
        const auto compute = [=](ptrdiff_t n, ptrdiff_t d_step, ptrdiff_t out_step, ptrdiff_t target_step) {
            const float gradient = d[n * d_step];  // read in any case, which compilers need to compute several at once
            target[n * target_step] = out[n * out_step] <= 0 ? 0 : gradient;
        };
        if (delta.n == 1 && y.n == 1 && to.n == 1)
            for (ptrdiff_t n = 0; n < batch; ++n) compute(n, 1, 1, 1);
        else
            for (ptrdiff_t n = 0; n < batch; ++n) compute(n, delta.n, y.n, to.n);
    }
}

// Outputs of a dense layer, (features, batch), plus the bias of each feature; all by the thread that calls, see `gate`.
void add_bias(const float* products, const float* bias, ptrdiff_t features, ptrdiff_t batch, float* to) {
    for (ptrdiff_t f = 0; f < features; ++f, products += batch, to += batch)
        for (ptrdiff_t n = 0; n < batch; ++n) to[n] = products[n] + bias[f];
}

}  // namespace
}  // namespace tombola

#include "stretch.hpp"

namespace tombola {
namespace {

// The size of images of which the samples lie side by side.
struct Images {
    int channels;
    ptrdiff_t count;  // of samples and pixels of a channel
    Numbers size;

    Images(const char* name, nb::handle tensor) : size(Tensor<float>(name, tensor).sizes()) {
        if (size.count != 4 || size.at[1] > INT_MAX)
            Tensor<float>(name, tensor).refuse(", of shape (batch, channels, height, width)");
        channels = static_cast<int>(size.at[1]);
        count = size.at[0] * size.at[2] * size.at[3];
    }

    // Of a tensor of this size.
    float* address(const char* name, nb::handle tensor) const {
        return Tensor<float>(name, tensor).batch_fastest({size.at[0], size.at[1], size.at[2], size.at[3]});
    }
};

// Batch normalisation of a batch of images, (batch, channels, height, width), whose samples lie side by side. The
// statistics are (3, channels): mean, biased variance, 1 / sqrt(variance + epsilon).
void batch_norm(nb::handle x, nb::handle weight, nb::handle bias, float epsilon, nb::handle statistics, nb::handle y,
                const Name& instruction_set) {
    const Kernels& kernels = kernels_named(instruction_set);
    const Images images("x", x);
    const int channels = images.channels;
    const float *w = Tensor<float>("weight", weight).contiguous({channels}),
                *b = Tensor<float>("bias", bias).contiguous({channels}), *from = images.address("x", x);
    float *mean = Tensor<float>("statistics", statistics).contiguous({3, channels}), *to = images.address("y", y);
    nb::gil_scoped_release unlocked;
    kernels.batch_norm(from, channels, images.count, w, b, epsilon, mean, mean + channels, mean + 2 * channels, to);
}

void batch_norm_gradient(nb::handle x, nb::handle delta, nb::handle weight, nb::handle statistics, nb::handle gradient,
                         nb::handle weight_gradient, nb::handle bias_gradient, const Name& instruction_set) {
    const Kernels& kernels = kernels_named(instruction_set);
    const Images images("x", x);
    const int channels = images.channels;
    const float *from = images.address("x", x), *d = images.address("delta", delta),
                *w = Tensor<float>("weight", weight).contiguous({channels}),
                *mean = Tensor<float>("statistics", statistics).contiguous({3, channels});
    float *dx = images.address("gradient", gradient),
          *dw = Tensor<float>("weight_gradient", weight_gradient).contiguous({channels}),
          *db = Tensor<float>("bias_gradient", bias_gradient).contiguous({channels});
    nb::gil_scoped_release unlocked;
    kernels.batch_norm_gradient(from, d, channels, images.count, w, mean, mean + 2 * channels, dx, dw, db);
}

// Images of bytes, and which of them are read.
struct Chosen {
    const uint8_t* images;
    ptrdiff_t all, channels, height, width;
    const int64_t* which;
    ptrdiff_t count;

    Chosen(nb::handle tensor, nb::handle indices) {
        const Tensor<const uint8_t> pixels("images", tensor);
        const Numbers size = pixels.sizes();
        images = pixels.contiguous({any, any, any, any});
        all = size.at[0], channels = size.at[1], height = size.at[2], width = size.at[3];
        const Tensor<const int64_t> numbers("indices", indices);
        count = numbers.strided({any}).size.at[0];
        which = numbers.contiguous({any});
        if (channels > INT_MAX) throw std::invalid_argument("images: expected fewer than 2^31 channels");
        for (ptrdiff_t k = 0; k < count; ++k)
            if (which[k] < 0 || which[k] >= all)
                throw nb::index_error(("indices: expected numbers of " + std::to_string(all) + " images, from 0, got " +
                                       std::to_string(which[k]) + " at position " + std::to_string(k))
                                          .c_str());
    }
};

// The images of these indices, (pixel - mean) * scale for each channel.
void normalise_images(nb::handle images, nb::handle indices, nb::handle mean, nb::handle scale, nb::handle target,
                      const Name& instruction_set) {
    const Kernels& kernels = kernels_named(instruction_set);
    const Chosen from(images, indices);
    const float *center = Tensor<float>("mean", mean).contiguous({from.channels, 1, 1}),
                *slope = Tensor<float>("scale", scale).contiguous({from.channels, 1, 1});
    float* const to = Tensor<float>("target", target).contiguous({from.count, from.channels, from.height, from.width});
    nb::gil_scoped_release unlocked;
    kernels.normalise_images(from.images, from.which, from.count, static_cast<int>(from.channels),
                             from.height * from.width, center, slope, to);
}

// The same of images that are changed first: an image of `crop` more zeros on each side, mirrored where `flips` says so, is
// cropped from the row and the column on that `offsets` has for it. The target is (count, height, width, channels).
void augment_images(nb::handle images, nb::handle indices, nb::handle offsets, nb::handle flips, int crop, nb::handle mean,
                    nb::handle scale, nb::handle target) {
    const Chosen from(images, indices);
    Layer::check_sizes({{"crop", crop, 0, Layer::most_pixels}});
    const int64_t* const starts = Tensor<const int64_t>("offsets", offsets).contiguous({from.all, 2});
    const bool* const mirrored = Tensor<const bool>("flips", flips).contiguous({from.all});
    const float *center = Tensor<float>("mean", mean).contiguous({from.channels, 1, 1}),
                *slope = Tensor<float>("scale", scale).contiguous({from.channels, 1, 1});
    float* to = Tensor<float>("target", target).contiguous({from.count, from.height, from.width, from.channels});
    for (ptrdiff_t k = 0; k < from.count; ++k)
        for (const int64_t start : {starts[2 * from.which[k]], starts[2 * from.which[k] + 1]})
            if (start < 0 || start > 2 * crop)
                throw nb::index_error(("offsets: expected numbers from 0 to " + std::to_string(2 * crop) + ", got " +
                                       std::to_string(start) + " for image " + std::to_string(from.which[k]))
                                          .c_str());
    nb::gil_scoped_release unlocked;
    std::vector<std::array<float, 256>> normal(from.channels);  // of each pixel that there may be
    for (ptrdiff_t c = 0; c < from.channels; ++c)
        for (int pixel = 0; pixel < 256; ++pixel) normal[c][pixel] = (float(pixel) - center[c]) * slope[c];
    const ptrdiff_t plane = from.height * from.width, size = from.channels * plane;
    for (ptrdiff_t k = 0; k < from.count; ++k) {
        if (k + 1 < from.count)  // images lie anywhere in memory
            for (ptrdiff_t i = 0; i < size; i += 64) __builtin_prefetch(from.images + from.which[k + 1] * size + i);
        const int64_t n = from.which[k], top = starts[2 * n] - crop, left = starts[2 * n + 1] - crop;
        const ptrdiff_t first = mirrored[n] ? left + from.width - 1 : left, step = mirrored[n] ? -1 : 1;
        for (ptrdiff_t y = top; y < top + from.height; ++y, to += from.width * from.channels)
            for (ptrdiff_t c = 0; c < from.channels; ++c) {
                const uint8_t* const channel = from.images + n * size + c * plane;
                const uint8_t* const row = 0 <= y && y < from.height ? channel + y * from.width : nullptr;
                const float* const values = normal[c].data();
                for (ptrdiff_t j = 0, x = first; j < from.width; ++j, x += step)
                    to[j * from.channels + c] = values[row && 0 <= x && x < from.width ? row[x] : 0];
            }
    }
}

// Add a bias to outputs, (features, batch), in place.
void add_bias_to(nb::handle outputs, nb::handle bias) {
    const Numbers size = Tensor<float>("outputs", outputs).sizes();
    if (size.count != 2) Tensor<float>("outputs", outputs).refuse(", of shape (features, batch)");
    const ptrdiff_t features = size.at[0], batch = size.at[1];
    float* const y = Tensor<float>("outputs", outputs).contiguous({features, batch});
    const float* const added = Tensor<float>("bias", bias).contiguous({features});
    check_apart(y, "bias", added);
    nb::gil_scoped_release unlocked;
    add_bias(y, added, features, batch, y);
}

// The gradient of the input of a ReLU, given the gradient of its output, and the output; all are (batch, features).
void gate_rows(nb::handle delta, nb::handle y, nb::handle target) {
    const Batch from = batch_of("delta", delta, {any, any});
    const ptrdiff_t features = Tensor<float>("delta", delta).sizes().at[1];
    const View out = batch_of("y", y, {from.samples, features}).view, to = target_of(target, {from.samples, features});
    check_apart(to.data, "delta", from.view.data);
    check_apart(to.data, "y", out.data);
    nb::gil_scoped_release unlocked;
    gate(from.view, out, features, from.samples, to);
}

// Which channels of images come from connections of `source`, the layer before them, and which lead to some of `reader`, the
// only one after them; null for all.
struct Channels {
    const uint8_t *connected = nullptr, *read = nullptr;

    Channels(const ImageSize& size, const Layer* source, const Layer* reader) {
        const auto of = [&](const char* name, const std::vector<uint8_t>& channels) {
            if (channels.size() != size_t(size.channels))
                throw std::invalid_argument(std::string(name) + ": expected a layer of " + std::to_string(size.channels) +
                                            " channels, got " + std::to_string(channels.size()));
            return channels.data();
        };
        if (source) connected = of("source", source->connected_outputs());
        if (reader) read = of("reader", reader->connected_inputs());
    }
};

void pack_images(nb::handle source, const PackedImages& target) {
    Calls* const calls = Calls::putting();
    const auto [batch, channels, height, width] = target.size();
    const View from = batch_of("source", source, {batch, channels, height, width}).view;
    Calls::compute(calls, [&target, from] {
        target.kernels().pack_images(from, target.size(), target.border(), target.packed());
    });
}

void unpack_images(const PackedImages& source, nb::handle target) {
    Calls* const calls = Calls::putting();
    const auto [batch, channels, height, width] = source.size();
    const View to = target_of(target, {batch, channels, height, width}, true);
    Calls::compute(calls, [&source, to] { source.kernels().unpack_images(source.packed(), source.size(), to); });
}

// Null for no images; else as `as`, with the size and the instruction set of others.
const Packed* as_or_null(const char* name, const PackedImages* images, const PackedImages& others) {
    return images ? &images->as(name, others.size(), others.kernels()) : nullptr;
}

void normalise_packed(const PackedImages& x, nb::handle weight, nb::handle bias, double epsilon, nb::handle statistics,
                      const PackedImages* other, bool relu, const PackedImages& y, const Layer* source,
                      const Layer* reader) {
    Calls* const calls = Calls::putting();
    const ptrdiff_t channels = x.size().channels;
    const Packed from = x.packed(), to = y.as("y", x.size(), x.kernels());
    const Packed* const more = as_or_null("other", other, x);
    y.check_apart("y", "x", x);
    if (other) y.check_apart("y", "other", *other);
    const float *w = Tensor<float>("weight", weight).contiguous({channels}),
                *b = Tensor<float>("bias", bias).contiguous({channels});
    float* mean = Tensor<float>("statistics", statistics).contiguous({3, channels});
    const Channels some(x.size(), source, reader);
    Calls::compute(calls, [=, &x] {
        x.kernels().normalise_packed(from, x.size(), w, b, float(epsilon), mean, mean + channels, mean + 2 * channels, more,
                                     relu, to, some.connected, some.read);
    });
}

// Updates running statistics by those of x, whose variance is then the unbiased one.
void update_statistics(const PackedImages& x, nb::handle statistics, double momentum, nb::handle running_mean,
                       nb::handle running_variance) {
    Calls* const calls = Calls::putting();
    const auto [batch, channels, height, width] = x.size();
    const double count = double(batch) * height * width;
    if (count < 2) throw std::invalid_argument("x: expected at least two numbers in each channel");
    float *mean = Tensor<float>("running_mean", running_mean).contiguous({channels}),
          *variance = Tensor<float>("running_variance", running_variance).contiguous({channels});
    const float* found = Tensor<float>("statistics", statistics).contiguous({3, channels});
    Calls::compute(calls, [=, channels = channels] {
        for (int c = 0; c < channels; ++c) {
            mean[c] = float((1 - momentum) * mean[c] + momentum * found[c]);
            variance[c] = float((1 - momentum) * variance[c] + momentum * (count / (count - 1)) * found[channels + c]);
        }
    });
}

void normalise_gradient_packed(const PackedImages& x, const PackedImages& delta, nb::handle weight, nb::handle bias,
                               nb::handle statistics, bool relu, const PackedImages* y, const PackedImages& gradient,
                               nb::handle weight_gradient, nb::handle bias_gradient, const Layer* source,
                               const Layer* reader) {
    Calls* const calls = Calls::putting();
    const ptrdiff_t channels = x.size().channels;
    const Packed from = x.packed(), d = delta.as("delta", x.size(), x.kernels()),
                 to = gradient.as("gradient", x.size(), x.kernels());
    const Packed* const out = as_or_null("y", y, x);
    gradient.check_apart("gradient", "x", x);
    delta.check_apart("delta", "x", x);  // delta is changed too, by the gate of y
    const float *w = Tensor<float>("weight", weight).contiguous({channels}),
                *b = Tensor<float>("bias", bias).contiguous({channels}),
                *mean = Tensor<float>("statistics", statistics).contiguous({3, channels});
    float *dw = Tensor<float>("weight_gradient", weight_gradient).contiguous({channels}),
          *db = Tensor<float>("bias_gradient", bias_gradient).contiguous({channels});
    const Channels some(x.size(), source, reader);
    Calls::compute(calls, [=, &x] {
        x.kernels().normalise_gradient_packed(from, d, x.size(), w, b, mean, mean + 2 * channels, relu, out, to, dw, db,
                                              some.connected, some.read);
    });
}

// The target y may be one of the sources.
void sum_packed(const PackedImages& a, const PackedImages* b, bool relu, const PackedImages& y) {
    Calls* const calls = Calls::putting();
    const Packed one = a.packed(), to = y.as("y", a.size(), a.kernels());
    const Packed* const two = as_or_null("b", b, a);
    Calls::compute(calls, [=, &a] { a.kernels().sum_packed(one, two, a.size(), relu, to); });
}

void gate_packed(const PackedImages& delta, const PackedImages& y) {
    Calls* const calls = Calls::putting();
    const Packed d = delta.packed(), out = y.as("y", delta.size(), delta.kernels());
    Calls::compute(calls, [=, &delta] { delta.kernels().gate_packed(d, out, delta.size()); });
}

// A window of max-pooling as Python gives it: height, width, steps, padding.
using Window6 = std::tuple<int, int, int, int, int, int>;

// The window over images of a size, and the size of what it leaves.
std::pair<Window, ImageSize> window_over(const ImageSize& size, Window6 numbers) {
    Window w{};
    std::tie(w.height, w.width, w.step_down, w.step_right, w.pad_top, w.pad_left) = numbers;
    const int most = 1 << 20;  // of a side: sums with the size of images fit an int
    const bool sound = w.height > 0 && w.width > 0 && w.height <= most && w.width <= most && w.step_down > 0 &&
                       w.step_right > 0 && w.pad_top >= 0 && w.pad_left >= 0 && w.pad_top <= w.height / 2 &&
                       w.pad_left <= w.width / 2 && w.height <= size.height + 2 * w.pad_top &&
                       w.width <= size.width + 2 * w.pad_left;
    if (!sound)
        throw std::invalid_argument("window: expected one that fits the images, with padding of at most half its size");
    w.target_height = (size.height + 2 * w.pad_top - w.height) / w.step_down + 1;
    w.target_width = (size.width + 2 * w.pad_left - w.width) / w.step_right + 1;
    return {w, {size.batch, size.channels, w.target_height, w.target_width}};
}

void max_pool_packed(Window6 window, const PackedImages& x, const PackedImages& y) {
    Calls* const calls = Calls::putting();
    const auto [over, left] = window_over(x.size(), window);
    const Packed to = y.as("y", left, x.kernels());
    y.check_apart("y", "x", x);
    Calls::compute(calls, [&x, to, w = over] { x.kernels().max_pool(x.packed(), x.size(), w, to); });
}

void max_pool_gradient_packed(Window6 window, const PackedImages& x, const PackedImages& y, const PackedImages& delta,
                              const PackedImages& gradient) {
    Calls* const calls = Calls::putting();
    const auto [over, left] = window_over(x.size(), window);
    const Packed most = y.as("y", left, x.kernels()), d = delta.as("delta", left, x.kernels()),
                 to = gradient.as("gradient", x.size(), x.kernels());
    gradient.check_apart("gradient", "x", x);
    gradient.check_apart("gradient", "y", y);
    gradient.check_apart("gradient", "delta", delta);
    Calls::compute(calls, [&x, most, d, to, w = over] {
        x.kernels().max_pool_gradient(x.packed(), most, d, x.size(), w, to);
    });
}

ImageSize one_pixel(const ImageSize& size) { return {size.batch, size.channels, 1, 1}; }

void average_packed(const PackedImages& x, const PackedImages& y) {
    Calls* const calls = Calls::putting();
    const Packed to = y.as("y", one_pixel(x.size()), x.kernels());
    y.check_apart("y", "x", x);
    Calls::compute(calls, [&x, to] { x.kernels().average(x.packed(), x.size(), to); });
}

void average_gradient_packed(const PackedImages& delta, const PackedImages& gradient) {
    Calls* const calls = Calls::putting();
    const Packed d = delta.as("delta", one_pixel(gradient.size()), gradient.kernels());
    gradient.check_apart("gradient", "delta", delta);
    Calls::compute(calls, [&gradient, d] { gradient.kernels().average_gradient(d, gradient.size(), gradient.packed()); });
}

NB_MODULE(_sparse, m) {
    torch() = new Torch;
    nb::set_leak_warnings(false);  // layers that live until the interpreter ends are no leak
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Kernels* k : supported()) names.push_back(k->name);
        return names;
    });
    nb::class_<Layer>(m, "Layer")
        .def(nb::init<nb::handle, int, int, std::pair<int, int>, std::pair<int, int>, int, std::pair<int, int>,
                      const Name&, nb::handle>(),
             nb::arg("alive"), nb::arg("outputs"), nb::arg("inputs"), nb::arg("kernel"), nb::arg("image"),
             nb::arg("stride"), nb::arg("padding"), nb::arg("instruction_set").none(), nb::arg("read"))
        .def("forward", &Layer::forward, nb::arg("values"), nb::arg("bias").none(), nb::arg("source"),
             nb::arg("target"))
        .def("input_gradient",
             nb::overload_cast<nb::handle, nb::handle, nb::handle>(&Layer::input_gradient, nb::const_),
             nb::arg("values"), nb::arg("delta"), nb::arg("target"))
        .def("weight_gradient", &Layer::weight_gradient, nb::arg("source"), nb::arg("delta"), nb::arg("gradient"),
             nb::arg("bias_gradient").none())
        .def_prop_ro("border", &Layer::border)
        .def_prop_ro("delta_border", &Layer::delta_border)
        .def_prop_ro("block", &Layer::block)
        .def("forward_images", &Layer::forward_images, nb::arg("values"), nb::arg("bias").none(), nb::arg("source"),
             nb::arg("target"), nb::arg("all") = true)
        .def("input_gradient_images", &Layer::input_gradient_images, nb::arg("values"), nb::arg("delta"),
             nb::arg("target"), nb::arg("add"), nb::arg("all") = true)
        .def("weight_gradient_images", &Layer::weight_gradient_images, nb::arg("source"), nb::arg("delta"),
             nb::arg("gradient"), nb::arg("bias_gradient").none())
        .def("gradients_images", &Layer::gradients_images, nb::arg("values"), nb::arg("source"), nb::arg("delta"),
             nb::arg("gradient"), nb::arg("bias_gradient").none(), nb::arg("target"), nb::arg("add"),
             nb::arg("all") = true);
    nb::class_<FewSamples>(m, "FewSamples")
        .def(nb::init<nb::handle, int, int, std::pair<int, int>, std::pair<int, int>, int, std::pair<int, int>, int,
                      const Name&>(),
             nb::arg("alive"), nb::arg("outputs"), nb::arg("inputs"), nb::arg("kernel"), nb::arg("image"),
             nb::arg("stride"), nb::arg("padding"), nb::arg("samples"), nb::arg("instruction_set").none())
        .def("forward", &FewSamples::forward, nb::arg("values"), nb::arg("bias").none(), nb::arg("source"),
             nb::arg("target"));
    nb::class_<Chain>(m, "Chain")
        .def(nb::init<nb::tuple, std::vector<bool>>())
        .def_prop_ro("inputs", &Chain::inputs)
        .def_prop_ro("outputs", &Chain::outputs)
        .def("floats", &Chain::floats, nb::arg("batch"))
        .def("forward", &Chain::forward, nb::arg("weights"), nb::arg("source"), nb::arg("target"), nb::arg("memory"))
        .def("backward", &Chain::backward, nb::arg("weights"), nb::arg("delta"), nb::arg("memory"),
             nb::arg("gradients"), nb::arg("target").none());
    m.def("load_operators",
          [](const std::string& path, bool onednn) { return pytorch().load(path.c_str(), onednn); }, nb::arg("path"),
          nb::arg("onednn"));
    nb::class_<Stretch>(m, "Stretch")
        .def(nb::init<nb::handle, nb::handle, nb::handle, nb::handle, int, nb::tuple>(), nb::arg("inputs"),
             nb::arg("mean").none(), nb::arg("scale").none(), nb::arg("labels"), nb::arg("batch"), nb::arg("layers"))
        .def("multiply", &Stretch::multiply, nb::arg("gradients"), nb::arg("masks"))
        .def("sgd", &Stretch::sgd, nb::arg("parameters"), nb::arg("gradients"), nb::arg("momenta"),
             nb::arg("weight_decay"), nb::arg("momentum"), nb::arg("nesterov"))
        .def("adam", &Stretch::adam, nb::arg("parameters"), nb::arg("gradients"), nb::arg("means"), nb::arg("squares"),
             nb::arg("steps"), nb::arg("beta1"), nb::arg("beta2"), nb::arg("weight_decay"), nb::arg("epsilon"),
             nb::arg("decoupled"))
        .def("run", &Stretch::run, nb::arg("order"), nb::arg("rates"), nb::arg("losses"), nb::arg("seconds"));
    m.def("batch_norm", batch_norm, nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("epsilon"),
          nb::arg("statistics"), nb::arg("y"), nb::arg("instruction_set") = nb::none());
    m.def("batch_norm_gradient", batch_norm_gradient, nb::arg("x"), nb::arg("delta"), nb::arg("weight"),
          nb::arg("statistics"), nb::arg("gradient"), nb::arg("weight_gradient"), nb::arg("bias_gradient"),
          nb::arg("instruction_set") = nb::none());
    m.def("normalise_images", normalise_images, nb::arg("images"), nb::arg("indices"), nb::arg("mean"),
          nb::arg("scale"), nb::arg("target"), nb::arg("instruction_set") = nb::none());
    m.def("augment_images", augment_images, nb::arg("images"), nb::arg("indices"), nb::arg("offsets"), nb::arg("flips"),
          nb::arg("crop"), nb::arg("mean"), nb::arg("scale"), nb::arg("target"));
    m.def("add_bias", add_bias_to, nb::arg("outputs"), nb::arg("bias"));
    m.def("gate", gate_rows, nb::arg("delta"), nb::arg("y"), nb::arg("target"));
    m.def("block", [](const Name& instruction_set) { return kernels_named(instruction_set).conv_block; },
          nb::arg("instruction_set") = nb::none());
    nb::class_<Calls>(m, "Calls").def(nb::init<>()).def("put", &Calls::put).def("run", &Calls::run);
    nb::class_<PackedImages>(m, "PackedImages")
        .def(nb::init<Size4, int, const Name&>(), nb::arg("size"), nb::arg("border"),
             nb::arg("instruction_set") = nb::none())
        .def_prop_ro("size", [](const PackedImages& images) {
            const auto [batch, channels, height, width] = images.size();
            return Size4{batch, channels, height, width};
        })
        .def_prop_ro("border", &PackedImages::border);
    m.def("pack_images", pack_images, nb::arg("source"), nb::arg("target"));
    m.def("unpack_images", unpack_images, nb::arg("source"), nb::arg("target"));
    m.def("normalise_packed", normalise_packed, nb::arg("x"), nb::arg("weight"), nb::arg("bias"),
          nb::arg("epsilon").noconvert(), nb::arg("statistics"), nb::arg("other").none(), nb::arg("relu"), nb::arg("y"),
          nb::arg("source").none() = nb::none(), nb::arg("reader").none() = nb::none());
    m.def("update_statistics", update_statistics, nb::arg("x"), nb::arg("statistics"), nb::arg("momentum").noconvert(),
          nb::arg("running_mean"), nb::arg("running_variance"));
    m.def("normalise_gradient_packed", normalise_gradient_packed, nb::arg("x"), nb::arg("delta"), nb::arg("weight"),
          nb::arg("bias"), nb::arg("statistics"), nb::arg("relu"), nb::arg("y").none(), nb::arg("gradient"),
          nb::arg("weight_gradient"), nb::arg("bias_gradient"), nb::arg("source").none() = nb::none(),
          nb::arg("reader").none() = nb::none());
    m.def("sum_packed", sum_packed, nb::arg("a"), nb::arg("b").none(), nb::arg("relu"), nb::arg("y"));
    m.def("gate_packed", gate_packed, nb::arg("delta"), nb::arg("y"));
    m.def("max_pool_packed", max_pool_packed, nb::arg("window"), nb::arg("x"), nb::arg("y"));
    m.def("max_pool_gradient_packed", max_pool_gradient_packed, nb::arg("window"), nb::arg("x"), nb::arg("y"),
          nb::arg("delta"), nb::arg("gradient"));
    m.def("average_packed", average_packed, nb::arg("x"), nb::arg("y"));
    m.def("average_gradient_packed", average_gradient_packed, nb::arg("delta"), nb::arg("gradient"));
    Calls::set_types(m.attr("pack_images"), m.attr("Calls")().attr("run"));
}

}  // namespace
}  // namespace tombola

// A sparse layer's forward pass for few samples. A part of sparse.cpp, with its checks and its memory.
#pragma once

namespace tombola {
namespace {

// The source is packed as (channel, phase, row, sample, column), with the padding's zeros: pixel (y, x) is in phase
// (y % stride, x % stride), at row y / stride and column x / stride. Target pixel (y, x) of sample n is at
// (y * samples + n) * pitch + x, so that a tap reads the whole target at one distance. The columns that are no pixels
// of the target are computed for nothing. Without a stride, a row's padding on the right is that of the next row on
// the left.
class FewSamples {
  public:
    FewSamples(nb::handle alive_tensor, int outputs, int inputs, std::pair<int, int> kernel, std::pair<int, int> image,
               int stride, std::pair<int, int> padding, int samples, const Name& instruction_set)
        : kernels_(kernels_named(instruction_set)), inputs_(inputs), samples_(samples), stride_(stride),
          kernel_(kernel), linear_(kernel == std::pair(1, 1) && image == kernel && padding == std::pair(0, 0)), image_(image),
          padding_(padding) {
        Layer::check(outputs, inputs, kernel, image, stride, padding);
        Layer::check_sizes({{"samples", samples, 1, 1 << 20}});
        if (linear_ && samples > 1)
            samples_ = samples = (samples + kernels_.lanes - 1) / kernels_.lanes * kernels_.lanes;
        const auto [indices, sizes, step] = Tensor<const int64_t>("alive", alive_tensor).strided({any});
        Tensor<const int64_t>("alive", alive_tensor).contiguous({any});
        const int kernel_size = kernel.first * kernel.second;
        const int count = Layer::check_indices(indices, sizes.at[0], outputs, int64_t(inputs) * kernel_size);
        const int64_t height = image.first + 2 * padding.first, width = image.second + 2 * padding.second;
        target_ = {static_cast<int>((height - kernel.first) / stride + 1),
                   static_cast<int>((width - kernel.second) / stride + 1)};
        const int64_t rows = (height + stride - 1) / stride;
        pitch_ = stride == 1 ? std::max<int64_t>(image.second + padding.second, target_.second)
                             : (width + stride - 1) / stride;
        plane_ = rows * samples * pitch_;
        const int64_t phases = int64_t(stride) * stride;
        length_ = (int64_t(target_.first - 1) * samples + samples - 1) * pitch_ + target_.second;
        slack_ = lanes_most + padding.second;
        if (plane_ > INT_MAX / phases / inputs - slack_)
            throw std::invalid_argument("image: so many samples of so large an image are too large");
        first_.resize(outputs + 1);
        offset_.reserve(count);
        for (int k = 0; k < count; ++k) {
            const int64_t channel = indices[k] / kernel_size;
            const int tap = static_cast<int>(indices[k] % kernel_size), y = tap / kernel.second, x = tap % kernel.second;
            const int64_t phase = (channel % inputs * stride + y % stride) * stride + x % stride;
            offset_.push_back(static_cast<int32_t>(phase * plane_ + y / stride * samples * pitch_ + x / stride));
            ++first_[channel / inputs + 1];
        }
        for (int r = 0; r < outputs; ++r) first_[r + 1] += first_[r];
        few_ = {outputs, first_.data(), offset_.data()};
    }

    // A batch of any size, so many samples at a time.
    void forward(nb::handle values, nb::handle bias, nb::handle source, nb::handle target) const {
        const float* const w = Tensor<float>("values", values).contiguous({ptrdiff_t(offset_.size())});
        const float* const b = contiguous_or_null("bias", bias, {few_.rows});
        const bool flat = linear_ && Tensor<float>("source", source).sizes().count == 2;
        const Batch x = flat ? batch_of("source", source, {any, inputs_})
                             : batch_of("source", source, {any, inputs_, image_.first, image_.second});
        const View y = flat ? target_of(target, {x.samples, few_.rows})
                            : target_of(target, {x.samples, few_.rows, target_.first, target_.second});
        check_apart(y.data, "source", x.view.data);
        nb::gil_scoped_release unlocked;
        if (linear_ && samples_ == 1 && x.view.c == 1) {
            for (int n = 0; n < x.samples; ++n)
                kernels_.gather_one(few_, w, b, x.view.data + n * x.view.n, y.data + n * y.n, y.c);
            return;
        }
        const int64_t packed = plane_ * stride_ * stride_ * inputs_ + slack_;
        float* const memory = workspace(packed + int64_t(few_.rows) * few_vectors_most * kernels_.lanes);
        for (int first = 0; first < x.samples; first += samples_) {
            const int samples = std::min(samples_, x.samples - first);
            pack(x.view, first, samples, memory, packed);
            gather(w, b, memory, memory + packed, y, first, samples);
        }
    }

  private:
    static constexpr int lanes_most = 16;

    void pack(const View& from, int first, int samples, float* to, int64_t size) const {
        if (linear_)
            return kernels_.pack_few(from.data + first * from.n, from.n, from.c, samples, samples_, inputs_, to);
        std::memset(to, 0, size * sizeof(float));
        for (int c = 0; c < inputs_; ++c)
            for (int y = 0; y < image_.first; ++y) {
                if ((y + padding_.first) % stride_ >= kernel_.first) continue;  // no tap reads this phase
                const int top = y + padding_.first, phase = (c * stride_ + top % stride_) * stride_;
                for (int n = 0; n < samples; ++n) {
                    const float* const in = from.data + (first + n) * from.n + c * from.c + y * from.h;
                    float* const out = to + phase * plane_ + (int64_t(top / stride_) * samples_ + n) * pitch_;
                    if (stride_ == 1 && from.w == 1)
                        std::memcpy(out + padding_.second, in, image_.second * sizeof(float));
                    else
                        for (int x = 0; x < std::min(stride_, image_.second); ++x) {
                            const int left = x + padding_.second;
                            if (left % stride_ >= kernel_.second) continue;
                            float* to_phase = out + left % stride_ * plane_ + left / stride_;
                            for (int each = x; each < image_.second; each += stride_) *to_phase++ = in[each * from.w];
                        }
                }
            }
    }

    // A piece of a packed row of the target that lies side by side in the target too.
    struct Piece {
        int at, count;
        ptrdiff_t to;
    };

    void gather(const float* values, const float* bias, const float* packed, float* tile, const View& to, int first,
                int samples) const {
        const int lanes = kernels_.lanes, all = static_cast<int>((length_ + lanes - 1) / lanes),
                  tiles = (all + few_vectors_most - 1) / few_vectors_most;
        Piece pieces[few_vectors_most * lanes_most];
        for (int t = 0, begin = 0; t < tiles; ++t) {
            const int vectors = (all - begin) / (tiles - t), size = vectors * lanes;
            kernels_.gather_few(few_, vectors, values, bias, packed + int64_t(begin) * lanes, tile);
            int count = 0;
            for (int at = 0; at < size;) {
                const int64_t position = int64_t(begin) * lanes + at, row = position / pitch_;
                const int x = static_cast<int>(position % pitch_), n = static_cast<int>(row % samples_);
                const int step = static_cast<int>(std::min<int64_t>(pitch_ - x, size - at));
                const int inside = std::min(step, target_.second - x);
                if (inside > 0 && n < samples && row / samples_ < target_.first)
                    pieces[count++] = {at, inside, (first + n) * to.n + row / samples_ * to.h + x * to.w};
                at += step;
            }
            for (int r = 0; r < few_.rows; ++r) {
                const float* const from = tile + int64_t(r) * size;
                float* const out = to.data + r * to.c;
                for (int p = 0; p < count; ++p)
                    if (to.w == 1 && pieces[p].count > 1)
                        std::memcpy(out + pieces[p].to, from + pieces[p].at, pieces[p].count * sizeof(float));
                    else
                        for (int i = 0; i < pieces[p].count; ++i) out[pieces[p].to + i * to.w] = from[pieces[p].at + i];
            }
            begin += vectors;
        }
    }

    const Kernels& kernels_;
    int inputs_, samples_, stride_;
    std::pair<int, int> kernel_;
    bool linear_;  // one pixel of one pixel; such tensors may have two dimensions
    std::pair<int, int> image_, padding_, target_;
    int64_t pitch_ = 0, plane_ = 0, length_ = 0, slack_ = 0;
    std::vector<int32_t> first_, offset_;
    Few few_{};
};

}  // namespace
}  // namespace tombola

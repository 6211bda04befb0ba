#include "reference_linear.hpp"
namespace fewbit::engine {
namespace {
class ReferenceLinear : public Linear {
  public:
    ReferenceLinear(const float *w, std::size_t out, std::size_t in) : Linear(out, in), w_(w) {}
    InputFormat input_format(std::size_t) const override { return {}; }
    std::size_t tile() const override { return 4; }
    std::size_t bytes() const override { return 4 * out_features * in_features; }
    void multiply(const Input &x, float *y, std::size_t s, std::size_t begin, std::size_t end) const override {
        for (std::size_t m = 0; m < x.rows; ++m)
            for (std::size_t n = begin; n < end; ++n) {
                float t[16] = {};
                const float *a = x.values + m * x.stride, *b = w_ + n * in_features;
                std::size_t k = 0;
                for (; k + 16 <= in_features; k += 16)
                    for (int i = 0; i < 16; ++i) t[i] += a[k + i] * b[k + i];
                for (; k < in_features; ++k) t[0] += a[k] * b[k];
                float r = 0;
                for (int i = 0; i < 16; ++i) r += t[i];
                y[m * s + n] = r;
            }
    }
  private:
    const float *w_;
};
}
std::unique_ptr<Linear> make_reference_linear(const float *w, std::size_t out, std::size_t in) { return std::make_unique<ReferenceLinear>(w, out, in); }
}

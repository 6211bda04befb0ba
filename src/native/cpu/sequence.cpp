#include "sequence.hpp"

#include "thread_pool.hpp"

#include <algorithm>
#include <deque>
#include <memory>
#include <mutex>

namespace fewbit {

void multiply_in_turn(const std::vector<const Linear *> &linears, const Rows &x, const std::vector<float *> &y) {
    static std::mutex one_at_a_time; // the buffers stay from call to call
    static std::vector<std::unique_ptr<PreparedInput>> &buffers = *new std::vector<std::unique_ptr<PreparedInput>>;
    std::lock_guard<std::mutex> lock(one_at_a_time);

    // Two buffers per format take turns: while a thread fills one of them, another may still read the other; the barrier in between keeps them
    // from being further apart.
    ThreadPool &threads = pool();
    std::vector<InputFormat> formats;
    std::vector<PreparedInput *> prepared;
    std::deque<Ranges> ranges; // they cannot be moved
    for (const Linear *linear : linears) {
        const InputFormat format = linear->input_format(x.rows);
        const std::size_t known = std::size_t(std::find(formats.begin(), formats.end(), format) - formats.begin());
        if (known == formats.size()) formats.push_back(format);
        while (buffers.size() < 2 * formats.size()) buffers.push_back(std::make_unique<PreparedInput>());
        prepared.push_back(buffers[2 * known + prepared.size() % 2].get());
        prepared.back()->reshape(format, x.rows, x.columns, threads.threads());
        ranges.emplace_back(linear->out_features, linear->tile(), threads.threads());
    }
    threads.run([&](std::size_t thread) {
        for (std::size_t i = 0; i < linears.size(); ++i) {
            const Linear &linear = *linears[i];
            prepared[i]->fill(x, Norm{}, thread, threads.threads());
            threads.barrier(thread);
            for (std::size_t begin = 0, end = 0; ranges[i].take(begin, end);) {
                linear.multiply(prepared[i]->input(), y[i], linear.out_features, begin, end);
            }
        }
    });
}

} // namespace fewbit

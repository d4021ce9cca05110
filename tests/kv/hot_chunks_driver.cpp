// Runs hot_chunks over a mover that copies nothing: commands on standard input, what happens on standard output.
#include "kv/hot_chunks.h"

#include "error.h"

#include <iostream>
#include <memory>
#include <sstream>

namespace {

struct told : actqkv::mover {
    void start(int il, int32_t chunk, int32_t slot) override {
        std::cout << "start " << il << ' ' << chunk << ' ' << slot << '\n';
    }
};

void print_stats(const actqkv::hot_stats & s) {
    std::cout << "stats " << s.n_hits << ' ' << s.n_misses << ' ' << s.n_prefetched << ' ' << s.n_wasted << ' '
              << s.bytes << '\n';
}

} // namespace

int main() {
    told mover;
    std::unique_ptr<actqkv::hot_chunks> hot;
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::string command;
        words >> command;
        try {
            if (command == "new") {
                uint64_t n_layer, chunk_bytes, limit, n_most;
                words >> n_layer >> chunk_bytes >> limit >> n_most;
                hot = std::make_unique<actqkv::hot_chunks>((int) n_layer, chunk_bytes, limit, (int32_t) n_most, mover);
                std::cout << "slots " << hot->n_slots() << '\n';
                continue;
            }
            int32_t first;
            words >> first;
            std::vector<int32_t> chunks;
            for (int32_t number; words >> number;) {
                chunks.push_back(number);
            }
            const int n = (int) chunks.size();
            if (command == "plan") {
                for (const int32_t slot : hot->plan(first, chunks.data(), n)) {
                    std::cout << "at " << slot << '\n';
                }
            } else if (command == "prefetch") {
                hot->prefetch(first, chunks.data(), n);
            } else if (command == "fill") {
                hot->fill(first, chunks.at(0), chunks.at(1));
            } else if (command == "forget") {
                hot->forget_from(first);
            }
            print_stats(hot->stats());
        } catch (const actqkv::error & failure) {
            std::cout << "error " << failure.what() << '\n';
        }
    }
    return 0;
}

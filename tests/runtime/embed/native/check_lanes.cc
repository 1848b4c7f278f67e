// Per line: lanes, images, their seconds on 1 … lanes lanes, owned; prints how many images at once, and owned:held.
#include <iostream>
#include <sstream>

#include "lanes.h"

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        driffusion::u32 lanes = 0, images = 0, count = 0;
        words >> lanes >> images;
        std::vector<driffusion::Seconds> seconds(images, driffusion::Seconds(lanes));
        std::vector<const driffusion::Seconds *> there;
        for (auto &one : seconds) {
            for (double &value : one) words >> value;
            there.push_back(&one);
        }
        words >> count;
        std::vector<driffusion::u32> owned(count);
        for (auto &lane : owned) words >> lane;
        std::cout << driffusion::at_once(there, lanes);
        for (auto &[lane, own] : driffusion::divide(lanes, owned)) {
            std::cout << ' ' << lane << ':';
            for (std::size_t n = 0; n < own.size(); ++n) std::cout << (n ? "," : "") << own[n];
        }
        std::cout << '\n';
    }
}

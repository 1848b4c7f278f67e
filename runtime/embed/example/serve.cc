// serve BUNDLE PROGRAM FOLDER: images for whoever writes lines to it, several at once; it answers in lines, too.
//   draw NAME SEED PROMPT…  →  preview NAME STEPS (FOLDER/NAME.preview.png), then: done NAME SECONDS (FOLDER/NAME.png)
//   cancel NAME             →  failed NAME CANCELLED: …
//   an empty line or the end of the input: waits for what is being made, and ends
#include <driffusion.hpp>
#include <iostream>
#include <map>
#include <mutex>
#include <sstream>
#include <thread>

#include "png.hpp"

void say(const std::string &line) {  // from any thread
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    std::cout << line << std::endl;
}

struct client {
    driffusion::request request;  // made in a thread of the library, which shares the lanes among all that are there
    std::thread waiting;
};

void wait(driffusion::request &request, const std::string &file, const std::string &name) try {
    driffusion::image image = request.wait();
    write_png(file + ".png", image.rgb.data(), image.width, image.height);
    say("done " + name + " " + std::to_string(image.result.total_seconds));
} catch (const std::exception &error) {
    say("failed " + name + " " + error.what());
}

int main(int argc, char **argv) try {
    if (argc != 4) throw std::runtime_error("usage: serve BUNDLE PROGRAM FOLDER");
    driffusion::engine engine(argv[1], argv[2]);
    std::map<std::string, client> clients;  // of this thread alone
    for (std::string line, verb, name; std::getline(std::cin, line) && !line.empty();) {
        std::istringstream words(line);
        driffusion::call call;
        words >> verb >> name;
        const std::string file = std::string(argv[3]) + "/" + name;
        if (verb == "draw" && words >> call.seed && std::getline(words >> std::ws, call.prompt) && !clients.count(name)) {
            call.preview_every = 10;
            call.preview = [=](auto rgb, auto width, auto height, auto finished) {
                write_png(file + ".preview.png", rgb, width, height);
                say("preview " + name + " " + std::to_string(finished));
                return true;
            };
            client &made = clients.emplace(name, client{engine.start(call), {}}).first->second;
            made.waiting = std::thread(wait, std::ref(made.request), file, name);
        } else if (verb == "cancel" && clients.count(name)) {
            clients.at(name).request.cancel();
        } else say("what? " + line);
    }
    for (auto &[name, one] : clients) one.waiting.join();
} catch (const std::exception &error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
}

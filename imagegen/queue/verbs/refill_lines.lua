-- Moves tasks from lines that have stopped into the stream, unless a line has moved since it was listed.
--
-- KEYS    1 stream; 2 index of the lines; then each line
-- ARGV    1 life of a record in ms; then three for each line: its client; tasks to move; id of its first task when it
--         was listed
-- result  number of commands; then for each line what `move` returns
local stream, index, commands, results = KEYS[1], KEYS[2], 0, {}
for i = 3, #KEYS do
  local line, at = KEYS[i], i * 3 - 7
  local first = string.match(redis.call('LINDEX', line, 0) or '', '^%d+ %d+ %x+ (%x+)\n') or ''
  if first == ARGV[at + 2] then
    results[#results + 1] = {move(stream, index, line, ARGV[at], tonumber(ARGV[at + 1]), ARGV[1])}
  else
    results[#results + 1] = {0, 0, 0, {}}
  end
  commands = commands + 1 + results[#results][3]
end
return {commands, results}

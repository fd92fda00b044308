-- Moves tasks from lines until each client has its number of tasks in the stream, and lists what waits in the lines.
--
-- KEYS    1 stream; 2 index of the lines; then each line
-- ARGV    1 tasks of a client in the stream, 0 to move none; 2 life of a record in ms; 3 maximum of listed tasks of a
--         line; then the client of each line
-- result  number of commands; then for each line: what `move` returns; its length; the ids of its first tasks
local stream, index, window, commands = KEYS[1], KEYS[2], tonumber(ARGV[1]), 0
local present, results = {}, {}
for i = 4, #ARGV do present[ARGV[i]] = 0 end

local low, PAGE = '-', 500
while window > 0 and low do
  local rows = redis.pcall('XRANGE', stream, low, '+', 'COUNT', PAGE)
  if rows.err then break end
  commands = commands + 1
  for _, row in ipairs(rows) do
    for field = 1, #row[2], 2 do
      local client = row[2][field] == 'd' and client_of(row[2][field + 1])
      if client and present[client] then present[client] = present[client] + 1 end
    end
  end
  low = #rows == PAGE and '(' .. rows[#rows][1]
end

for i = 3, #KEYS do
  local line, client = KEYS[i], ARGV[i + 1]
  local wanted = math.max(window - present[client], 0)
  local taken, is_empty, cost, moved = move(stream, index, line, client, wanted, ARGV[2])
  local elements = redis.call('LRANGE', line, 0, ARGV[3] - 1)
  local length, ids = #elements, {}
  commands = commands + cost + 1
  if length == tonumber(ARGV[3]) then length, commands = redis.call('LLEN', line), commands + 1 end
  if length == 0 and is_empty == 0 then
    redis.call('SREM', index, client)
    is_empty, commands = 1, commands + 1
  end
  for at, element in ipairs(elements) do ids[at] = string.match(element, '^%d+ %d+ %x+ (%x+)\n') or '' end
  results[#results + 1] = {taken, is_empty, cost, moved, length, ids}
end
return {commands, results}
